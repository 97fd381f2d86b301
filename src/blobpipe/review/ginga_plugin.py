"""
``Blobs`` shows what blobpipe finds on the image in a channel: circles by status, a table, and three cutouts of the
blob that is selected.

**Where the blobs come from**

Write the name of the log of ``blobpipe quicklook`` into "Log" and press "From the log", to see what the log has for the
image on show, by the name of its file.  Or press "Search" to search the image itself with the packaged network: name a
median stack in "Stack", unless the image is a difference image already.

**Looking**

Select a row of the table to jump to the blob.  Below the table are the difference, the template and the network's map
around it, side by side.

**Deciding**

Write your name into "Reviewer" and press "Confirm", "Reject" or "Unsure".  The decision goes into the log, as from the
review page; only candidates of the log can be decided.
"""

from __future__ import annotations

import io
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
from ginga.GingaPlugin import LocalPlugin
from ginga.gw import Viewers, Widgets
from PIL import Image as Picture

from blobpipe.core.arrays import Image
from blobpipe.core.cutouts import cut_square
from blobpipe.core.detector import DEFAULT, read_detector
from blobpipe.core.fits_images import frame_name
from blobpipe.errors import BlobpipeError, FrameError
from blobpipe.monitor import logbook
from blobpipe.review import sightings
from blobpipe.review.sightings import Sighting

LAYER = "blobpipe-blobs"
COLORS = {
    "confirmed": "green",
    "rejected": "gray",
    "unsure": "orange",
    "new": "yellow",
    "seen_again": "orange",
    "known": "cyan",
    "dip": "magenta",
    "bad_pixels": "magenta",
    "faded": "gray",
}
COLUMNS = [
    ("No.", "number"),
    ("Candidate", "candidate"),
    ("x", "x"),
    ("y", "y"),
    ("Radius", "radius"),
    ("S/N", "snr"),
    ("Depth %", "depth"),
    ("Probability", "probability"),
    ("Status", "status"),
]
KINDS = {"difference": "Difference", "stack": "Template", "map": "Network's map"}

# Side of the cutouts (px of the image), and of the viewers that show them (px of the screen)
CUTOUT_PX = 96
VIEWER_PX = 130

# Radius of the circle of a blob without a measured one (px)
NO_RADIUS_PX = 8.0


class Blobs(LocalPlugin):  # type: ignore[misc]
    """Show, search and review blobs in a channel of ginga."""

    def __init__(self, fv: Any, fitsimage: Any) -> None:
        super().__init__(fv, fitsimage)
        self.settings = fv.get_preferences().create_category("plugin_Blobs")
        self.settings.add_defaults(log="quicklook/log.sqlite", stack="", detector="", reviewer="")
        self.settings.load(onError="silent")
        self.shown: dict[str, Sighting] = {}
        self.selected = ""
        self.searched: sightings.Searched | None = None
        self.viewers: dict[str, Any] = {}
        self.gui_up = False
        self.draw_classes = fv.get_draw_classes()
        self.canvas = self.draw_classes.DrawingCanvas()
        self.canvas.set_surface(fitsimage)

    # ------------------------------------------------------------------------------------------------ window

    def build_gui(self, container: Any) -> None:
        """Build the fields, the table, the cutouts and the buttons."""
        box = Widgets.VBox()
        box.set_spacing(4)
        captions = (
            ("Log:", "label", "log", "entry"),
            ("Stack:", "label", "stack", "entry"),
            ("Detector:", "label", "detector", "entry"),
            ("Reviewer:", "label", "reviewer", "entry"),
        )
        fields, self.w.fields = Widgets.build_info(captions)
        for name in ("log", "stack", "detector", "reviewer"):
            self.w.fields[name].set_text(self.settings.get(name))
        self.w.fields.detector.set_tooltip("Name or file; empty: that of the log, else WFC3/IR")
        box.add_widget(fields)
        box.add_widget(self._buttons({"From the log": self.show_log, "Search": self.search_image}))

        self.w.table = Widgets.TreeView(sortable=True, use_alt_row_color=True)
        self.w.table.setup_table(COLUMNS, 1, "number")
        self.w.table.add_callback("selected", self._select)
        box.add_widget(self.w.table, stretch=1)

        box.add_widget(self._cutout_viewers())
        box.add_widget(
            self._buttons(
                {
                    "Confirm": lambda: self.decide("confirmed"),
                    "Reject": lambda: self.decide("rejected"),
                    "Unsure": lambda: self.decide("unsure"),
                }
            )
        )
        self.w.message = Widgets.Label("")
        box.add_widget(self.w.message)
        box.add_widget(self._buttons({"Close": self.close, "Help": self.help}))
        container.add_widget(box, stretch=1)
        self.gui_up = True

    def _buttons(self, work: dict[str, Any]) -> Any:
        """Return a row of buttons."""
        row = Widgets.HBox()
        row.set_spacing(3)
        for text, action in work.items():
            button = Widgets.Button(text)
            button.add_callback("activated", lambda _, action=action: action())
            row.add_widget(button)
            self.w[text] = button
        return row

    def _cutout_viewers(self) -> Any:
        """Return three small viewers, side by side, each with its name above."""
        row = Widgets.HBox()
        for kind, title in KINDS.items():
            viewer = Viewers.CanvasView(logger=self.logger)
            viewer.set_desired_size(VIEWER_PX, VIEWER_PX)
            viewer.enable_autozoom("on")
            viewer.enable_autocuts("on")
            viewer.set_bg(0.2, 0.2, 0.2)
            self.viewers[kind] = viewer
            column = Widgets.VBox()
            column.add_widget(Widgets.Label(title))
            widget = Viewers.GingaViewerWidget(viewer=viewer)
            widget.resize(VIEWER_PX, VIEWER_PX)
            column.add_widget(widget, stretch=1)
            row.add_widget(column, stretch=1)
        return row

    # ------------------------------------------------------------------------------------------------ blobs

    def show_log(self) -> None:
        """Show what the log has for the image on show."""
        self._try(self._show_log)

    def _show_log(self) -> str:
        path = Path(self.w.fields.log.get_text())
        with closing(logbook.connect(path)) as connection:
            found = sightings.of_log(connection, self._image_name())
        self.searched = None
        self._show(found)
        return f"{self._image_name()}: {_count(found)} in {path}"

    def search_image(self) -> None:
        """Search the image on show."""
        self._try(self._search_image)

    def _search_image(self) -> str:
        image = self.fitsimage.get_image()
        if image is None:
            raise FrameError("no image in this channel, expected one; load it first")
        stack = self.w.fields.stack.get_text().strip()
        named = self.w.fields.detector.get_text().strip()
        detector = read_detector(named) if named else DEFAULT
        pixels = np.asarray(image.get_data(), np.float32)
        self.searched = sightings.search(pixels, Path(stack) if stack else None, detector)
        self._show(self.searched.sightings)
        return f"{self._image_name()}: {_count(self.searched.sightings)} by a search"

    def _show(self, found: list[Sighting]) -> None:
        """Fill the table, and draw a circle for each sighting."""
        self.shown = {str(number): one for number, one in enumerate(found, start=1)}
        self.selected = ""
        for viewer in self.viewers.values():
            viewer.clear()
        self.w.table.set_tree({key: _row(key, one) for key, one in self.shown.items()})
        self.w.table.set_optimal_column_widths()
        self._draw()

    def _draw(self) -> None:
        """Draw a circle and a number for each sighting; that of the selected one is bold."""
        draw = self.draw_classes
        marks = []
        for key, one in self.shown.items():
            radius = 1.6 * (one.radius_px if np.isfinite(one.radius_px) else NO_RADIUS_PX)
            look = {
                "color": COLORS.get(one.verdict, "white"),
                "linewidth": 3 if key == self.selected else 1,
                "linestyle": "dash" if one.verdict in ("rejected", "unsure") else "solid",
            }
            marks.append(draw.Circle(one.x_px, one.y_px, radius, **look))
            marks.append(
                draw.Text(
                    one.x_px + radius, one.y_px + radius, key, color=look["color"], fontsize=12
                )
            )
        self.canvas.delete_all_objects()
        if marks:
            self.canvas.add(draw.CompoundObject(*marks))
        self.fitsimage.redraw(whence=3)

    def _select(self, _: Any, rows: dict[str, Any], *__: Any) -> None:
        """Jump to the sighting of the first selected row, and show its cutouts."""
        key = next(iter(rows), "")
        if key in self.shown:
            self._try(lambda: self.go_to(key))

    def go_to(self, key: str) -> str:
        """Move the view to a sighting, and show its cutouts; ``key`` is its number in the table."""
        one = self.shown[key]
        self.selected = key
        self.fitsimage.set_pan(one.x_px, one.y_px)
        self._draw()
        for kind, pixels in self._cutouts(one).items():
            self.viewers[kind].set_data(pixels)
            self.viewers[kind].zoom_fit()
        return f"{key}: x {one.x_px:.1f}, y {one.y_px:.1f}, {one.verdict.replace('_', ' ')}"

    def _cutouts(self, one: Sighting) -> dict[str, Any]:
        """Return the surroundings of a sighting by kind: from the search, else the log's pictures."""
        if self.searched is not None:
            planes = {
                "difference": self.searched.difference,
                "stack": self.searched.template,
                "map": self.searched.response,
            }
            return {
                kind: np.nan_to_num(_around(plane, one))
                for kind, plane in planes.items()
                if plane is not None
            }
        if one.detection is None:
            return {}
        with closing(logbook.connect(self.w.fields.log.get_text())) as connection:
            drawn = sightings.pictures(connection, one.detection)
        return {
            # Pictures begin at the top
            kind: np.flipud(np.asarray(Picture.open(io.BytesIO(drawn[kind])).convert("L")))
            for kind in KINDS
            if kind in drawn
        }

    def decide(self, decision: sightings.Decision) -> None:
        """Write the decision about the selected candidate to the log."""
        self._try(lambda: self._decide(decision))

    def _decide(self, decision: sightings.Decision) -> str:
        one = self.shown.get(self.selected)
        if one is None:
            raise BlobpipeError("no row is selected, expected that of a candidate; select it")
        if one.candidate is None:
            raise BlobpipeError(
                "this row is not a candidate of the log, expected one that has a number; press 'From the log'"
            )
        reviewer = self.w.fields.reviewer.get_text()
        with closing(logbook.connect(self.w.fields.log.get_text())) as connection:
            sightings.decide(connection, one.candidate, decision, reviewer)
        key = self.selected
        self._show_log()
        self.go_to(key)
        return f"candidate {one.candidate}: {decision} by {reviewer}"

    def _image_name(self) -> str:
        """Return the name of the image on show, as the log has it."""
        image = self.fitsimage.get_image()
        if image is None:
            raise FrameError("no image in this channel, expected one; load it first")
        path = image.get("path", None) or image.get("name", "")
        return frame_name(str(path).partition("[")[0])

    def _try(self, work: Any) -> None:
        """Do something, and say what came of it in one line."""
        try:
            text = work()
        except (BlobpipeError, OSError) as error:
            text = " ".join(str(error).split())
            self.logger.error(text)
        self.w.message.set_text(text)
        self.fv.show_status(text)

    # ------------------------------------------------------------------------------------------- life in ginga

    def start(self) -> None:
        """Add the circles' layer to the channel."""
        canvas = self.fitsimage.get_canvas()
        if not canvas.has_tag(LAYER):
            canvas.add(self.canvas, tag=LAYER)

    def stop(self) -> None:
        """Take the circles' layer away."""
        canvas = self.fitsimage.get_canvas()
        if canvas.has_tag(LAYER):
            canvas.delete_object_by_tag(LAYER)
        self.gui_up = False

    def redo(self) -> None:
        """Clear everything: another image is on show."""
        if self.gui_up:
            self.searched = None
            self._show([])

    def close(self) -> bool:
        """Close the plug-in."""
        self.fv.stop_local_plugin(self.chname, str(self))
        return True

    def __str__(self) -> str:
        return "Blobs"


def _around(plane: Image, one: Sighting) -> Image:
    """Return the surroundings of a sighting."""
    first = (round(one.x_px) - CUTOUT_PX // 2, round(one.y_px) - CUTOUT_PX // 2)
    return cut_square(plane, *first, CUTOUT_PX)


def _row(key: str, one: Sighting) -> dict[str, str]:
    """Return a row of the table."""
    return {
        "number": key,
        "candidate": "" if one.candidate is None else str(one.candidate),
        "x": f"{one.x_px:.1f}",
        "y": f"{one.y_px:.1f}",
        "radius": _number(one.radius_px, "{:.1f}"),
        "snr": _number(one.snr, "{:.1f}"),
        "depth": _number(100 * one.depth_frac, "{:.2f}"),
        "probability": _number(one.probability, "{:.3f}"),
        "status": one.verdict.replace("_", " "),
    }


def _number(value: float, form: str) -> str:
    """Return a number as text; empty for NaN."""
    return form.format(value) if np.isfinite(value) else ""


def _count(found: list[Sighting]) -> str:
    """Say how many sightings there are."""
    return f"{len(found)} sighting{'s' * (len(found) != 1)}"
