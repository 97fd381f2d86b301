"""The review in a real Chromium: by keyboard and by mouse, on a desk and on a phone, in light and dark, for every eye."""

from __future__ import annotations

import contextlib
import io
import math
import os
import re
import shutil
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import numpy as np
import pandas as pd
import pytest
from PIL import Image
from tests.unit import synthetic_log
from tests.unit.served import TOKEN, served

from blobpipe import cli
from blobpipe.monitor import logbook, thumbnails
from blobpipe.review import pages
from blobpipe.validation import report_page

api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
axe = pytest.importorskip(
    "axe_playwright_python.sync_playwright", reason="axe-playwright-python is not installed"
)

pytestmark = pytest.mark.xdist_group("browser")

SIZES = {1280: 900, 390: 844}
SCHEMES = ("light", "dark")
PAGES = {
    "today": "/",
    "queue": "/queue",
    "candidate": "/candidate/1",
    "image": "/image/220",
    "a rejected image": "/image/203",
    "images": "/images?first=2009-10-14",
    "map": "/map",
    "timeline": "/timeline",
    "a part of the map": "/map?sort=snr&decision=confirmed",
    "what is not there": "/nothing",
}
LOOKS = [(1280, "light"), (390, "dark")]
SECONDS = 120.0  # that anything may take


@dataclass
class Site:
    """A server that runs, and its log."""

    address: str
    log: Path

    def decisions(self) -> dict[int, str]:
        """Of each candidate."""
        with contextlib.closing(logbook.connect(self.log)) as connection:
            return {
                row["id"]: row["decision"]
                for row in connection.execute("SELECT * FROM candidate_list")
            }


@dataclass
class Heard:
    """What went wrong while a page was open, and what it asked for."""

    faults: list[str] = field(default_factory=list)
    requests: list[str] = field(default_factory=list)

    def listen(self, page: Any) -> None:
        page.on(
            "console",
            lambda said: (
                self.faults.append(said.text) if said.type in ("error", "warning") else None
            ),
        )
        page.on("pageerror", lambda error: self.faults.append(str(error)))
        page.on("requestfailed", self._failed)
        page.on("request", lambda asked: self.requests.append(asked.url))

    def _failed(self, asked: Any) -> None:
        if asked.failure != "net::ERR_ABORTED":  # the reader went on before the picture was there
            self.faults.append(f"{asked.url}: {asked.failure}")


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    path = shutil.which("chromium") or shutil.which("chromium-browser")
    if path is None:
        pytest.skip("no Chromium at hand: install Debian's package chromium")
    args = ["--no-sandbox"] if os.geteuid() == 0 else []
    with api.sync_playwright() as playwright:
        started = playwright.chromium.launch(executable_path=path, args=args)
        yield started
        started.close()


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    """``blobpipe serve`` on 220 images with five candidates, of which the first are decided on."""
    log = tmp_path_factory.mktemp("log") / "log.sqlite"
    connection = synthetic_log.make_log(log, 220)
    with logbook.writing(connection):
        for number, decision in ((1, "confirmed"), (2, "unsure"), (3, "rejected")):
            review = {
                "candidate": number,
                "decision": decision,
                "reviewer": "Ada",
                "reason": "as round as one",
            }
            logbook.insert(connection, "reviews", review | {"at": logbook.now()})
    for number in (219, 220):
        synthetic_log.keep_pixels(connection, number)
    connection.close()
    with served(log) as address:
        yield Site(address, log)


@pytest.fixture
def own(tmp_path: Path) -> Iterator[Site]:
    """A server of a log that a test may write to, with nothing decided."""
    log = tmp_path / "log.sqlite"
    connection = synthetic_log.make_log(log, 220)
    for number in (219, 220):
        synthetic_log.keep_pixels(connection, number)
    connection.close()
    with served(log) as address:
        yield Site(address, log)


@contextmanager
def tab(
    browser: Any, width: int = 1280, *, site: Site | None = None, **more: Any
) -> Iterator[tuple[Any, Heard]]:
    """A fresh browser window, signed in to ``site``; no fault may be heard by its end."""
    context = browser.new_context(viewport={"width": width, "height": SIZES[width]}, **more)
    if site:
        context.request.get(f"{site.address}/?token={TOKEN}")
    context.set_default_timeout(1e3 * SECONDS)
    page = context.new_page()
    heard = Heard()
    heard.listen(page)
    try:
        yield page, heard
    finally:
        context.close()
    assert heard.faults == []


@pytest.fixture
def desk(browser: Any, site: Site) -> Iterator[Any]:
    """A page of 1280 pixels, signed in."""
    with tab(browser) as (page, _):
        page.goto(f"{site.address}/?token={TOKEN}")
        yield page


def load_all(page: Any) -> None:
    """Let the browser fetch the pictures that are not in sight yet too."""
    page.evaluate(LOADED)
    assert (
        page.evaluate(
            "[...document.images].filter(image => !image.naturalWidth).map(image => image.src)"
        )
        == []
    )


def require_soundness(page: Any) -> None:
    """At both widths and in both schemes: no violation that axe knows of, and nothing that makes one scroll sideways."""
    load_all(page)
    page.evaluate(axe.Axe().axe_script)
    for width, scheme in product(SIZES, SCHEMES):
        page.set_viewport_size({"width": width, "height": SIZES[width]})
        page.emulate_media(color_scheme=scheme)
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        assert page.evaluate(BEYOND) == [], f"beyond {width} px"
        assert page.evaluate(VIOLATIONS) == [], f"{scheme}, {width} px"


LOADED = """Promise.all([...document.images].map(image => {
    image.loading = 'eager';
    return image.complete || new Promise(done => image.onload = image.onerror = done);
}))"""
BEYOND = """[...document.querySelectorAll('body *')].filter(e => !e.closest('.wide, .skip, svg'))
    .filter(e => e.getBoundingClientRect().right > innerWidth + 0.5).map(e => e.outerHTML.slice(0, 80))"""
VIOLATIONS = """axe.run({resultTypes: ['violations'], rules: {'target-size': {enabled: true}}}).then(found =>
    found.violations.flatMap(rule => rule.nodes.map(node => `${rule.id}: ${node.target} ${node.failureSummary}`)))"""


# ------------------------------------------------------------------------------------------------------- every page


@pytest.mark.parametrize("name", PAGES)
def test_every_page_is_sound_for_everybody(browser: Any, site: Site, name: str) -> None:
    with tab(browser, site=site) as (page, heard):
        answer = page.goto(site.address + PAGES[name])
        require_soundness(page)
        assert {urlsplit(url).netloc for url in heard.requests} <= {
            urlsplit(site.address).netloc,
            "",
        }
        if answer.status == 404:  # the browser's own words about the page that was asked for
            assert [fault for fault in heard.faults if "404" not in fault] == []
            heard.faults.clear()


@pytest.mark.parametrize(("width", "scheme"), list(product(SIZES, SCHEMES)))
def test_a_history_shows_every_depth_and_the_step(
    browser: Any, own: Site, width: int, scheme: str
) -> None:
    log = logbook.connect(own.log)
    with logbook.writing(log):
        n_depths = synthetic_log.log_history(log, 4)
    log.close()
    with look(browser, own, width, scheme) as page:
        page.goto(f"{own.address}/candidate/4")
        figure = page.locator("figure.history")
        words = figure.locator("figcaption").inner_text()
        assert "found in the mean of 8 images" in words
        assert re.search(r"landed between \d{4}-\d\d-\d\d and \d{4}-\d\d-\d\d \(90 %\)", words)

        # Every depth is a dot with an error bar that says its image; the step is one line through them
        assert figure.locator(".dot").count() == n_depths
        assert figure.locator(".dot line").count() == n_depths
        assert re.search(r"i\d{7}q_blob, .*%", figure.locator(".dot title").first.text_content())
        step = figure.locator("path.trend")
        assert step.count() == 1
        heights = {
            float(y) for y in re.findall(r"[ ,](-?[\d.]+)(?=[ML ]|$)", step.get_attribute("d"))
        }
        assert len(heights) == 2

        # It is in the picture, whole, and stands out of the background
        frame = figure.locator("svg").bounding_box()
        assert frame["x"] >= 0
        assert frame["x"] + frame["width"] <= width
        assert frame["height"] > 100
        colors = page.evaluate(
            """path => [getComputedStyle(path).stroke, getComputedStyle(document.body).backgroundColor]""",
            step.element_handle(),
        )
        assert colors[0] not in ("none", colors[1])
        require_soundness(page)


def test_axe_would_see_a_fault(browser: Any, site: Site) -> None:
    with tab(browser) as (page, _):
        page.goto(f"{site.address}/queue")
        page.evaluate("document.querySelector('main img').removeAttribute('alt')")
        page.evaluate("document.querySelector('main a').style.color = '#aaa'")
        page.evaluate(axe.Axe().axe_script)
        found = " ".join(page.evaluate(VIOLATIONS))
        assert "image-alt" in found
        assert "color-contrast" in found


def test_signing_in_is_sound_and_a_wrong_token_is_told(browser: Any, site: Site) -> None:
    with tab(browser) as (page, heard):
        page.goto(f"{site.address}/candidate/1")
        require_soundness(page)
        assert page.get_by_role("button", name="Confirm").count() == 0
        page.get_by_label("Token").fill("a-guess-of-the-token")
        page.get_by_role("button", name="Sign in").click()
        page.get_by_role("heading", name="Forbidden").wait_for()
        require_soundness(page)
        assert [fault for fault in heard.faults if "403" not in fault] == []
        heard.faults.clear()
        page.get_by_label("Token").fill(TOKEN)
        page.get_by_role("button", name="Sign in").click()
        page.get_by_role("link", name="Review").click()
        page.get_by_role("button", name="Confirm").first.wait_for()


@pytest.mark.parametrize("which", ["a day", "everything"])
def test_the_single_file_is_sound_and_asks_for_nothing(
    browser: Any, site: Site, which: str, tmp_path: Path
) -> None:
    path = tmp_path / "page.html"
    whole = ["--all"] if which == "everything" else []
    assert cli.main(["page", "--log", str(site.log), "--out", str(path), *whole]) == 0
    with tab(browser, offline=True) as (page, heard):
        page.goto(path.as_uri())
        require_soundness(page)
        assert page.get_by_role("img", name="Difference around candidate").count()
        assert [url for url in heard.requests if not url.startswith("data:")] == [path.as_uri()]


# -------------------------------------------------------------------------------------------------------- keyboard


def press(page: Any, *keys: str) -> None:
    for key in keys:
        page.keyboard.press(key)


def tab_to(page: Any, words: str) -> None:
    """Press Tab until something that says so has the focus."""
    for _ in range(60):
        press(page, "Tab")
        if words in page.evaluate(
            "(e => e.innerText + (e.getAttribute('name') || ''))(document.activeElement)"
        ):
            return
    raise AssertionError(f"Tab does not lead to {words}")


def focused(page: Any) -> int:
    """The candidate that has the focus."""
    return int(
        page.evaluate("(document.activeElement.closest('.card') || {id: 'candidate-0'}).id").split(
            "-"
        )[1]
    )


def said(page: Any) -> str:
    return str(page.locator(".said").get_by_role("status").inner_text())


def test_a_candidate_confirmed_by_keyboard_alone_is_in_the_catalogue(
    desk: Any, site: Site, tmp_path: Path
) -> None:
    tab_to(desk, "candidates to decide on")
    press(desk, "Enter")
    desk.wait_for_url("**/queue")
    press(desk, "j")
    number = focused(desk)
    assert site.decisions()[number] == ""
    press(desk, "c")  # no name yet: the browser asks for it
    assert desk.evaluate("document.activeElement.name") == "reviewer"
    desk.keyboard.type("Ada Lovelace")
    press(desk, "Enter")  # sends nothing
    assert site.decisions()[number] == ""
    tab_to(desk, "reason")
    desk.keyboard.type("as round as one, c or r")
    tab_to(desk, "Confirm")
    with desk.expect_navigation():
        press(desk, "Enter")
    assert said(desk).startswith(f"Candidate {number}: confirmed.")
    assert focused(desk) not in (0, number)
    catalogue = tmp_path / "blobs.csv"
    assert (
        cli.main(["catalogue", "update", "--log", str(site.log), "--catalogue", str(catalogue)])
        == 0
    )
    with contextlib.closing(logbook.connect(site.log)) as connection:
        row = connection.execute("SELECT * FROM candidate_list WHERE id = ?", (number,)).fetchone()
    table = pd.read_csv(catalogue)
    mine = table[table["reviewer"] == "Ada Lovelace"]
    assert mine[["x_px", "y_px"]].to_numpy().ravel() == pytest.approx(
        [row["x_px"], row["y_px"]], abs=1e-3
    )


@pytest.mark.parametrize(
    ("key", "decision"), [("r", "rejected"), ("u", "unsure"), ("c", "confirmed")]
)
def test_a_key_decides_and_goes_on_to_the_next(
    desk: Any, site: Site, key: str, decision: str
) -> None:
    desk.goto(f"{site.address}/queue?show=all")
    press(desk, "j")
    number = focused(desk)
    desk.locator(f"#candidate-{number}").get_by_label("Your name").fill("Grace")
    desk.locator(f"#candidate-{number}").focus()
    following = desk.locator("article.card").nth(1).get_attribute("id")
    with desk.expect_navigation():
        press(desk, key)
    assert said(desk).startswith(f"Candidate {number}: {decision}.")
    assert site.decisions()[number] == decision
    assert f"candidate-{focused(desk)}" == following
    press(desk, "j")
    assert f"candidate-{focused(desk)}" != following
    press(desk, "k")
    assert f"candidate-{focused(desk)}" == following


def test_keys_need_no_focus_where_there_is_one_candidate(desk: Any, site: Site) -> None:
    desk.goto(f"{site.address}/candidate/3")
    assert focused(desk) == 0
    with desk.expect_navigation():
        press(desk, "ArrowRight")
    desk.goto(f"{site.address}/candidate/4")
    desk.get_by_label("Your name").fill("Grace")
    desk.evaluate("document.activeElement.blur()")
    with desk.expect_navigation():
        press(desk, "u")
    assert site.decisions()[4] == "unsure"


def test_the_first_key_shows_which_of_several_is_meant(desk: Any, site: Site) -> None:
    desk.goto(f"{site.address}/queue?show=all")
    first = desk.locator("article.card").first
    before = site.decisions()
    for key in ("c", "x"):
        desk.evaluate("document.activeElement.blur()")
        press(desk, key)
        assert f"candidate-{focused(desk)}" == first.get_attribute("id")
    assert site.decisions() == before
    assert not first.get_by_role("checkbox").is_checked()
    press(desk, "x")
    assert first.get_by_role("checkbox").is_checked()


@pytest.mark.parametrize("width", SIZES)
@pytest.mark.parametrize(
    ("button", "decision"), [("Reject", "rejected"), ("Unsure", "unsure"), ("Confirm", "confirmed")]
)
def test_a_click_decides(browser: Any, site: Site, width: int, button: str, decision: str) -> None:
    with tab(browser, width, site=site, has_touch=width < 800) as (page, _):
        page.goto(f"{site.address}/candidate/4")
        page.get_by_label("Your name").fill("Grace")
        page.get_by_label("Reason").fill(f"by {width}")
        with page.expect_navigation():
            page.get_by_role("button", name=button).click()
        assert said(page).startswith(f"Candidate 4: {decision}.")
        assert site.decisions()[4] == decision
        assert f"{decision} Grace" in page.locator(".reviews li").first.inner_text()


def test_arrows_go_from_candidate_to_candidate(desk: Any, site: Site) -> None:
    desk.goto(f"{site.address}/candidate/3#candidate-3")
    assert focused(desk) == 3
    for key, number in (("ArrowRight", 4), ("j", 5), ("ArrowLeft", 4), ("k", 3)):
        with desk.expect_navigation():
            press(desk, key)
        heading = desk.get_by_role("heading", level=1).inner_text()
        assert heading.split()[:2] == ["Candidate", str(number)]
        assert focused(desk) == number
        assert desk.evaluate("scrollY") == 0  # the heading stays in sight


def test_keys_written_into_a_field_decide_nothing(desk: Any, site: Site) -> None:
    desk.goto(f"{site.address}/candidate/5#candidate-5")
    before = site.decisions()
    desk.get_by_label("Your name").focus()
    desk.keyboard.type("crujk")
    assert desk.get_by_label("Your name").input_value() == "crujk"
    press(desk, "Control+r")  # reloads, and does not reject
    desk.wait_for_load_state()
    assert site.decisions() == before


FOCUS = """() => {
    const e = document.activeElement, box = e.getClientRects()[0], style = getComputedStyle(e);
    const top = document.elementFromPoint(box.x + Math.min(box.width, innerWidth) / 2, box.y + Math.min(box.height, 24) / 2);
    return {
        what: e.outerHTML.slice(0, 90), place: [...document.querySelectorAll('*')].indexOf(e), body: e === document.body,
        outlined: style.outlineStyle !== 'none' && parseFloat(style.outlineWidth) >= 2,
        seen: box.width > 0 && box.top >= 0 && box.left >= 0 && e.contains(top),
    };
}"""


@pytest.mark.parametrize("width", SIZES)
@pytest.mark.parametrize("name", ["today", "queue", "candidate", "images", "map"])
def test_the_focus_is_seen_and_goes_in_reading_order(
    browser: Any, site: Site, name: str, width: int
) -> None:
    with tab(browser, width, site=site) as (page, _):
        page.goto(site.address + PAGES[name])
        places = []
        for _ in range(40):
            press(page, "Tab")
            found = page.evaluate(FOCUS)
            if found["body"]:
                break
            assert found["outlined"], found["what"]
            assert found["seen"], found["what"]
            places.append(found["place"])
        assert len(places) > 10
        assert places == sorted(places)


def test_the_first_tab_leads_past_the_navigation(desk: Any, site: Site) -> None:
    desk.goto(f"{site.address}/candidate/1")
    press(desk, "Tab")
    skip = desk.get_by_role("link", name="Skip to content")
    assert skip.bounding_box()["x"] >= 0
    press(desk, "Enter", "Tab")
    assert desk.evaluate("document.activeElement.closest('main') !== null")


# --------------------------------------------------------------------------------------------------------- pictures


def packed(site: Site, page: Any, number: int, plane: str) -> Any:
    """A plane of an image as the server sends it, unpacked."""
    answer = page.context.request.get(f"{site.address}/pixels/{number}/{plane}")
    return thumbnails.unpack(zlib.compress(answer.body()))[0]


def readout(page: Any) -> dict[str, str]:
    """What is said beside the picture."""
    lines = page.locator(".readout dl div").all()
    return {line.locator("dt").inner_text(): line.locator("dd").inner_text() for line in lines}


def await_words(page: Any, words: str) -> None:
    """Wait until they are said beside the picture."""
    page.locator(".readout").filter(has_text=words).wait_for()


def view_box(page: Any) -> list[float]:
    """Left, top, width, height of what is seen of the image (px)."""
    text = page.locator(".stage svg").get_attribute("viewBox")
    return [float(value) for value in text.split()]


def open_image(page: Any, site: Site, number: int = 220) -> Any:
    """Go to an image and wait for its pixels; return the stage."""
    page.goto(f"{site.address}/image/{number}")
    await_words(page, "of the light")
    return page.locator(".stage")


@contextmanager
def look(browser: Any, site: Site, width: int, scheme: str) -> Iterator[Any]:
    """A window of a size in a scheme, signed in."""
    with tab(browser, width, site=site, color_scheme=scheme, has_touch=width < 800) as (page, _):
        yield page


@pytest.mark.parametrize(("width", "scheme"), LOOKS)
def test_the_value_under_the_pointer_is_that_of_the_pixel(
    browser: Any, site: Site, width: int, scheme: str
) -> None:
    with look(browser, site, width, scheme) as page:
        stage = open_image(page, site)
        values = packed(site, page, 220, "difference")
        box = stage.bounding_box()
        at = {"x": round(box["width"] * 0.3), "y": round(box["height"] * 0.6)}
        stage.click(position=at)
        x = int((at["x"] + 0.0) / box["width"] * 1024)
        y = int(1024 - at["y"] / box["height"] * 1024)
        shown = readout(page)
        [x_shown, y_shown] = map(int, re.findall(r"\d+", shown["Pixel, 0-based"]))
        assert abs(x_shown - x) <= 1
        assert abs(y_shown - y) <= 1
        assert f"x {x_shown - 4}, y {y_shown - 4} (DS9, 1014 frame)" in shown["FLT, 1-based"]
        assert shown["Value"].startswith(light(values[y_shown, x_shown]))

        # pixel by pixel with keys; each step is announced
        stage.focus()
        press(page, "ArrowRight", "ArrowUp", "ArrowUp", "Shift+ArrowLeft")
        shown = readout(page)
        assert shown["Pixel, 0-based"] == f"x {x_shown + 1 - 10}, y {y_shown + 2}"
        assert shown["Value"].startswith(light(values[y_shown + 2, x_shown - 9]))
        assert page.locator(".readout").get_attribute("aria-live") == "polite"

        # no value, and the edge
        for _ in range(110):
            press(page, "Shift+ArrowDown")
        assert readout(page)["Pixel, 0-based"] == f"x {x_shown - 9}, y 0"
        assert readout(page)["Value"] == "no value"
        beside = page.locator(".readout").bounding_box()
        assert beside["y"] >= box["y"] + box["height"] or beside["x"] >= box["x"] + box["width"]


def light(value: float) -> str:
    """A value as the page writes it."""
    return f"{100 * float(value):.2f} % of the light lost".replace("-", "\N{MINUS SIGN}")


@pytest.mark.parametrize(("width", "scheme"), LOOKS)
def test_the_picture_is_zoomed_and_moved(browser: Any, site: Site, width: int, scheme: str) -> None:
    with look(browser, site, width, scheme) as page:
        stage = open_image(page, site)
        assert view_box(page) == [0, 0, 1024, 1024]
        stage.scroll_into_view_if_needed()
        box = stage.bounding_box()
        scrolled = page.evaluate("scrollY")

        # the wheel zooms where the pointer is, which stays there
        place = (box["x"] + 0.25 * box["width"], box["y"] + 0.25 * box["height"])
        page.mouse.move(*place)
        page.mouse.wheel(0, -600)
        await_words(page, "3.3")
        left, top, seen, _ = view_box(page)
        assert seen == pytest.approx(1024 / math.exp(1.2))
        assert left + 0.25 * seen == pytest.approx(256, abs=2)
        assert top + 0.25 * seen == pytest.approx(256, abs=2)
        assert page.evaluate("scrollY") == scrolled

        # a drag moves the picture with the pointer
        page.mouse.down()
        page.mouse.move(place[0] - 20, place[1] - 30, steps=5)
        page.mouse.up()
        moved = view_box(page)
        assert moved[0] - left == pytest.approx(20 / box["width"] * seen, rel=0.1)
        assert moved[1] - top == pytest.approx(30 / box["height"] * seen, rel=0.1)

        # keys, and the picture never leaves the frame
        stage.focus()
        press(page, "0")
        assert view_box(page) == [0, 0, 1024, 1024]
        press(page, *["+"] * 8)
        assert view_box(page)[2] == 16
        for _ in range(120):
            press(page, "Shift+ArrowRight")
        left, _, seen, _ = view_box(page)
        assert left + seen == 1024
        assert readout(page)["Pixel, 0-based"].startswith("x 1023,")
        page.get_by_role("button", name="Whole").click()
        assert view_box(page) == [0, 0, 1024, 1024]


@pytest.mark.parametrize(("width", "scheme"), LOOKS)
def test_planes_stretch_and_blinking(browser: Any, site: Site, width: int, scheme: str) -> None:
    with look(browser, site, width, scheme) as page:
        stage = open_image(page, site)
        stage.focus()
        press(page, "ArrowRight")
        where = readout(page)["Pixel, 0-based"]
        x, y = map(int, re.findall(r"\d+", where))
        for key, plane, name in (
            ("t", "template", "Template"),
            ("i", "image", "Image"),
            ("m", "map", "Network's map"),
            ("d", "difference", "Difference"),
        ):
            press(page, key)
            page.get_by_role("button", name=name, pressed=True).wait_for()
            values = packed(site, page, 220, plane)
            value = values[y // 4, x // 4] if plane == "map" else values[y, x]
            text = f"probability {value:.2f}" if plane == "map" else light(value)
            await_words(page, text)
            assert readout(page)["Shown"] == f"{name} of i0000220q_blob"

        # the stretch changes what is drawn
        drawn = "document.querySelector('.stage canvas').toDataURL()"
        at_4 = page.evaluate(drawn)
        press(page, "]")
        assert page.get_by_label("Stretch").input_value() == "8"
        assert page.evaluate(drawn) != at_4
        page.get_by_label("Stretch").select_option("4")
        assert page.evaluate(drawn) == at_4

        # one image and the image before, in turn
        stage.focus()
        press(page, "b")
        await_words(page, "i0000219q_blob, the image before")
        before = packed(site, page, 219, "difference")
        await_words(page, light(before[y, x]))
        await_words(page, "Difference of i0000220q_blob")
        press(page, "b")
        assert readout(page)["Shown"] == "Difference of i0000220q_blob"

        # circles and names go and come
        circle = page.locator(".stage .around circle").first
        assert circle.is_visible()
        press(page, "h")
        assert not circle.is_visible()


def test_who_wants_no_motion_blinks_by_hand(browser: Any, site: Site) -> None:
    with tab(browser, site=site, reduced_motion="reduce") as (page, _):
        stage = open_image(page, site)
        stage.focus()
        press(page, "b")
        await_words(page, "before")
        page.wait_for_timeout(1600)
        assert "before" in readout(page)["Shown"]


def test_two_fingers_zoom(browser: Any, site: Site) -> None:
    with tab(browser, 390, site=site, has_touch=True) as (page, _):
        stage = open_image(page, site)
        stage.scroll_into_view_if_needed()
        box = stage.bounding_box()
        fingers = page.context.new_cdp_session(page)

        def touch(kind: str, apart: float) -> None:
            x, y = box["x"] + box["width"] / 2, box["y"] + box["height"] / 2
            points = [{"x": x - apart, "y": y, "id": 1}, {"x": x + apart, "y": y, "id": 2}]
            fingers.send(
                "Input.dispatchTouchEvent",
                {"type": kind, "touchPoints": [] if kind == "touchEnd" else points},
            )

        touch("touchStart", 20)
        for apart in range(24, 84, 4):
            touch("touchMove", apart)
        touch("touchEnd", 0)
        assert view_box(page)[2] == pytest.approx(1024 / 4, rel=0.3)


def test_an_image_without_kept_pixels_says_so_and_still_zooms(browser: Any, site: Site) -> None:
    with tab(browser, site=site) as (page, _):
        page.goto(f"{site.address}/image/200")
        assert "not kept" in readout(page)["Value"]
        page.locator(".stage").focus()
        press(page, "+")
        assert view_box(page)[2] == 512


@pytest.mark.parametrize(("width", "scheme"), LOOKS)
def test_a_missed_blob_is_added_by_a_click(
    browser: Any, own: Site, width: int, scheme: str
) -> None:
    with look(browser, own, width, scheme) as page:
        stage = open_image(page, own)
        before = own.decisions()
        stage.focus()
        press(page, "a")
        require_soundness(page)
        page.set_viewport_size({"width": width, "height": SIZES[width]})
        stage.scroll_into_view_if_needed()
        box = stage.bounding_box()
        x, y = synthetic_log.MISSED
        at = {"x": (x + 0.5) / 1024 * box["width"], "y": (1023.5 - y) / 1024 * box["height"]}
        stage.click(position=at)
        form = page.get_by_role("form", name="Add a missed blob")
        assert float(form.get_by_label("x (px").input_value()) == pytest.approx(x, abs=3)
        assert float(form.get_by_label("y (px").input_value()) == pytest.approx(y, abs=3)
        form.get_by_label("Your name").fill("Grace")
        with page.expect_navigation():
            form.get_by_role("button", name="Add and confirm").click()
        added = {number: d for number, d in own.decisions().items() if number not in before}
        [(number, decision)] = added.items()
        assert decision == "confirmed"
        assert said(page) == f"Candidate {number}: confirmed."
        assert page.locator(".around.confirmed text").get_by_text(f"{number}").count() == 1


# ----------------------------------------------------------------------------------------------- tables and decisions


@pytest.mark.parametrize(("width", "scheme"), LOOKS)
def test_tables_sort_and_filter(browser: Any, site: Site, width: int, scheme: str) -> None:
    with look(browser, site, width, scheme) as page:
        page.goto(f"{site.address}/map")
        numbers = page.locator("tbody th")
        page.get_by_role("link", name="Candidate", exact=True).click()
        down = [int(text) for text in numbers.all_inner_texts()]
        assert down == sorted(down, reverse=True)
        page.get_by_role("link", name="Candidate", exact=True).click()
        assert [int(text) for text in numbers.all_inner_texts()] == down[::-1]
        require_soundness(page)
        page.locator("select[name=decision]").select_option("unsure")
        page.get_by_role("button", name="Show").click()
        assert [int(text) for text in numbers.all_inner_texts()] == [
            number for number, decision in site.decisions().items() if decision == "unsure"
        ]

        # a short table is sorted where it is
        with contextlib.closing(logbook.connect(site.log)) as connection:
            often = "SELECT id FROM candidate_list ORDER BY sightings DESC LIMIT 1"
            number = connection.execute(often).fetchone()["id"]
        page.goto(f"{site.address}/candidate/{number}")
        column = page.locator("table[data-sortable] tbody tr td:nth-child(7)")
        head = page.get_by_role("button", name="S/N")
        head.click()
        values = [float(text) for text in column.all_inner_texts()]
        assert len(values) > 2
        assert values == sorted(values, reverse=True)
        head.click()
        assert [float(text) for text in column.all_inner_texts()] == sorted(values)


@pytest.mark.parametrize(("width", "scheme"), LOOKS)
def test_several_are_decided_at_once_and_undone_by_a_key(
    browser: Any, own: Site, width: int, scheme: str
) -> None:
    with look(browser, own, width, scheme) as page:
        page.goto(f"{own.address}/queue?order=snr")
        before = own.decisions()
        send = page.get_by_role("button", name="Reject selected")
        assert send.is_disabled()
        boxes = page.get_by_role("checkbox")
        boxes.nth(0).check()
        press(page, "j", "j", "x")  # the second card, by keys
        assert page.locator("#bulk output").inner_text() == "2 selected"
        chosen = {int(box.get_attribute("value")) for box in boxes.all() if box.is_checked()}
        assert len(chosen) == 2
        page.locator("#bulk").get_by_label("Your name").fill("Grace")
        require_soundness(page)
        page.locator("article.card").first.focus()
        with page.expect_navigation():
            press(page, "R")
        assert own.decisions() == before | dict.fromkeys(chosen, "rejected")
        assert "rejected." in said(page)
        with page.expect_navigation():
            press(page, "z")
        assert own.decisions() == before
        assert "undecided again." in said(page)

        # the same in the table
        page.goto(f"{own.address}/map?sort=candidate")
        page.get_by_role("checkbox", name="Select candidate 1").check()
        page.get_by_role("checkbox", name="Select candidate 2").check()
        with page.expect_navigation():
            page.get_by_role("button", name="Confirm selected").click()
        assert own.decisions() == before | {1: "confirmed", 2: "confirmed"}
        assert page.url.startswith(f"{own.address}/map?sort=candidate&page=1&done=")
        assert page.get_by_text("Grace").count() >= 2
        with page.expect_navigation():
            page.get_by_role("button", name="Undo").click()
        assert own.decisions() == before

        # and by a key, with the focus still in the box
        page.goto(f"{own.address}/map?sort=candidate")
        page.get_by_role("checkbox", name="Select candidate 2").check()
        with page.expect_navigation():
            press(page, "R")
        assert own.decisions() == before | {2: "rejected"}


def test_without_the_token_a_page_says_why_there_are_no_buttons(browser: Any, site: Site) -> None:
    with tab(browser) as (page, _):
        page.goto(f"{site.address}/queue")
        assert page.get_by_role("button", name="Confirm").count() == 0
        assert page.get_by_role("checkbox").count() == 0
        page.get_by_role("link", name="Sign in").first.click()
        assert page.url.endswith("#sign-in")


# ---------------------------------------------------------------------------------------------------------- layout


def in_sight(page: Any, height: int) -> Callable[[Any], bool]:
    def seen(found: Any) -> bool:
        box = found.bounding_box()
        return bool(box["y"] >= 0 and box["y"] + box["height"] <= height)

    return seen


@pytest.mark.parametrize("where", ["/candidate/4", "/queue"])
def test_what_a_decision_needs_is_in_sight_at_once(desk: Any, site: Site, where: str) -> None:
    desk.goto(site.address + where)
    card = desk.locator("article.card").first
    parts = [
        *card.get_by_role("img").all(),
        *card.locator("dd").all(),
        *card.get_by_role("button").all(),
    ]
    assert len(parts) == 4 + 1 + 8 + 3
    seen = in_sight(desk, SIZES[1280])
    assert [
        part.inner_text() or part.get_attribute("alt") for part in parts if not seen(part)
    ] == []


def test_on_a_phone_the_decisions_stay_in_sight(browser: Any, site: Site) -> None:
    with tab(browser, 390, site=site) as (page, _):
        page.goto(f"{site.address}/candidate/4")
        seen = in_sight(page, SIZES[390])
        buttons = page.locator("article.card").get_by_role("button").all()
        assert len(buttons) == 3
        assert all(seen(button) for button in buttons)
        assert all(button.bounding_box()["height"] >= 44 for button in buttons)


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("name", ["report", "review"])
def test_a_table_shows_at_which_edge_it_goes_on(browser: Any, name: str, scheme: str) -> None:
    style = {"report": report_page.STYLE, "review": pages.asset("style.css")}[name]
    cells = "<td style='min-width: 20rem; height: 4rem'></td>" * 3
    rows = f"<div class='wide'><table><tbody><tr>{cells}</tr></tbody></table></div>"
    with tab(browser, 390, color_scheme=scheme) as (page, _):
        page.set_content(f"<style>{style}</style>{rows}")
        wide = page.locator(".wide")

        def shaded() -> list[bool]:
            """Whether the left and the right edge differ from the field between them."""
            picture = Image.open(io.BytesIO(wide.screenshot())).convert("L")
            row = np.asarray(picture, np.int16)[picture.height // 3]
            return [abs(int(row[k]) - int(row[len(row) // 2])) > 20 for k in (1, -2)]

        assert shaded() == [False, True]
        wide.evaluate("e => e.scrollTo(e.scrollWidth / 3, 0)")
        assert shaded() == [True, True]
        wide.evaluate("e => e.scrollTo(e.scrollWidth, 0)")
        assert shaded() == [True, False]


def test_words_in_graphs_are_not_cut(browser: Any, site: Site) -> None:
    cut = """[...document.querySelectorAll('svg text')].filter(text => {
        const a = text.getBoundingClientRect(), b = text.ownerSVGElement.getBoundingClientRect();
        return a.width && (a.left < b.left - 0.5 || a.right > b.right + 0.5 || a.top < b.top - 0.5 || a.bottom > b.bottom + 0.5);
    }).map(text => text.textContent)"""
    for width in SIZES:
        with tab(browser, width) as (page, _):
            for name in ("queue", "image", "map", "timeline"):
                page.goto(site.address + PAGES[name])
                assert page.evaluate(cut) == [], f"{name}, {width} px"


def test_a_browser_asks_again_only_for_what_has_changed(browser: Any, site: Site) -> None:
    with tab(browser) as (page, _):
        statuses: list[int] = []
        page.on(
            "response",
            lambda answer: statuses.append(answer.status) if "/picture/" in answer.url else None,
        )
        page.goto(f"{site.address}/candidate/1")
        load_all(page)
        assert set(statuses) == {200}
        assert len(statuses) == len(re.findall("/picture/", page.content())) == 4
