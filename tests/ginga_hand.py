"""Use the plug-in in a real ginga as a hand would: load an image, show the log, select, confirm, search; take pictures.

``xvfb-run -s "-screen 0 1500x1000x24" python -m tests.ginga_hand IMAGE LOG STACK FOLDER`` writes ``log.png`` and
``search.png`` into the folder, and prints what the plug-in says after each step.
"""

from __future__ import annotations

import sys
import threading
import time
from pathlib import Path
from typing import Any

STEP_S = 1.5  # between two steps, for the window to settle
LONGEST_S = 120.0  # for a search


def main(image: str, log: str, stack: str, folder: str) -> int:
    """Start ginga, and do one step after the other in a thread beside it."""
    from argparse import ArgumentParser

    from ginga.rv.main import ReferenceViewer, default_layout

    said: list[str] = []
    viewer = ReferenceViewer(layout=default_layout)
    viewer.add_default_plugins()
    viewer.add_separately_distributed_plugins()
    parser = ArgumentParser()
    viewer.add_default_options(parser)
    options = parser.parse_args(
        ["--toolkit", "qt", "--norestore", "--loglevel", "40", "--nosplash"]
    )
    run = viewer.run

    def run_with_hand() -> None:
        hand = threading.Thread(
            target=_work, args=(viewer.ginga_shell, image, log, stack, Path(folder), said)
        )
        hand.start()
        run()

    viewer.run = run_with_hand
    viewer.main(options, [image])
    return 0 if said and said[-1] == "done" else 1


def _work(shell: Any, image: str, log: str, stack: str, folder: Path, said: list[str]) -> None:
    """Do the steps; each runs in ginga's own thread."""

    def step(work: Any) -> Any:
        answer = shell.gui_call(work)
        time.sleep(STEP_S)
        return answer

    try:
        time.sleep(2 * STEP_S)
        channel = shell.get_channel("Image")
        step(lambda: shell.start_local_plugin("Image", "Blobs", None))
        plugin = channel.opmon.get_plugin("Blobs")
        step(lambda: plugin.w.fields.log.set_text(log))
        step(lambda: plugin.w.fields.reviewer.set_text("A. Reviewer"))
        step(plugin.show_log)
        said.append(plugin.w.message.get_text())
        candidates = [key for key, one in plugin.shown.items() if one.candidate is not None]
        step(lambda: said.append(plugin.go_to(candidates[0])))
        step(lambda: channel.fitsimage.zoom_to(2))
        step(lambda: plugin.decide("confirmed"))
        said.append(plugin.w.message.get_text())
        step(lambda: _picture(shell, folder / "log.png"))
        step(lambda: plugin.w.fields.stack.set_text(stack))
        step(plugin.search_image)
        said.append(plugin.w.message.get_text())
        if plugin.shown:
            # As a click does; ginga's own select_path tells nobody
            step(lambda: plugin.w.table.get_widget().topLevelItem(0).setSelected(True))
            said.append(plugin.w.message.get_text())
        step(lambda: _picture(shell, folder / "search.png"))
        # What is found by a search alone cannot be rejected: the plug-in must say so
        step(lambda: plugin.decide("rejected"))
        said.append(plugin.w.message.get_text())
        said.append("done")
    except Exception as error:
        said.append(repr(error))
    finally:
        print("\n".join(said), flush=True)
        shell.gui_do(shell.quit)


def _picture(shell: Any, path: Path) -> None:
    """Take a picture of the whole window."""
    from qtpy.QtWidgets import QApplication

    [window] = [each for each in QApplication.topLevelWidgets() if each.isVisible()][:1]
    window.grab().save(str(path))


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
