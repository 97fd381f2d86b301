"""The review in a real Chromium: by keyboard and by mouse, on a desk and on a phone, in light and dark, for every eye."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pandas as pd
import pytest
from tests.unit import synthetic_log
from tests.unit.served import TOKEN, served

from blobpipe import cli
from blobpipe.monitor import logbook

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
    "what is not there": "/nothing",
}
SECONDS = 30.0  # that anything may take


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
    return str(page.get_by_role("status").inner_text())


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
    desk.goto(f"{site.address}/queue")
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
        assert desk.get_by_role("heading", level=1).inner_text() == f"Candidate {number}"
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
