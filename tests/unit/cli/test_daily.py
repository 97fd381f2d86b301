"""Commands of every day."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
from tests.unit import synthetic_log
from tests.unit.cli.calls import PARAMS, Calls

import blobpipe
from blobpipe import cli
from blobpipe.cli.paths import LOG
from blobpipe.params import Notices, to_yaml
from blobpipe.quicklook import run
from blobpipe.quicklook.options import Options


@pytest.mark.parametrize("words", [[], ["--watch"], ["--silent"]], ids=" ".join)
def test_quicklook_has_its_folder_log_and_model(
    folder: Path, monkeypatch: pytest.MonkeyPatch, words: list[str]
) -> None:
    calls: Calls = []
    for name in ("quicklook", "watch"):
        monkeypatch.setattr(run, name, lambda *args, name=name: calls.append((name, args, {})))
    told = PARAMS.model_copy(update={"notices": Notices(digest="daily")})
    (folder / "params.yaml").write_text(to_yaml(told))
    (folder / "in").mkdir()
    assert cli.main(["quicklook", "in", *words]) == 0
    expected = told.model_copy(update={"notices": Notices()}) if words == ["--silent"] else told
    options = Options(Path(LOG), Path(blobpipe.__file__).with_name("model.safetensors"), expected)
    assert calls == [("watch" if "--watch" in words else "quicklook", (Path("in"), options), {})]


def test_the_log_is_printed_without_hashes_unless_all_of_it_is_asked_for(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    synthetic_log.make_log(Path(LOG), 40).close()
    assert cli.main(["log", "runs"]) == 0
    out = capsys.readouterr().out
    assert "aaa" not in out
    assert re.search(r"not shown: .*model_sha256", out)
    assert cli.main(["log", "runs", "--wide"]) == 0
    assert f" {'a' * 64} " in capsys.readouterr().out
    assert cli.main(["log", "notices"]) == 0
    assert re.fullmatch(
        r"no notices yet: 40 images logged, \d+ searched\n", capsys.readouterr().out
    )
    assert cli.main(["log", "runs", "--out", "runs.csv"]) == 0
    assert "a" * 64 in (folder / "runs.csv").read_text()


def test_a_dry_run_says_that_nothing_waits_and_that_no_channel_is_set_up(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    synthetic_log.make_log(Path(LOG), 40).close()
    unset = "no channel is set up: notices.mail_to is empty, notices.webhook is false"
    assert cli.main(["notify", "--dry-run"]) == 0
    assert capsys.readouterr().out.splitlines() == ["no notice waits", unset]
    told = PARAMS.model_copy(update={"notices": Notices(webhook=True)})
    (folder / "params.yaml").write_text(to_yaml(told))
    assert cli.main(["notify", "--dry-run"]) == 0
    assert capsys.readouterr().out == "no notice waits\n"


def test_a_mistyped_folder_is_told_before_anything_heavy_is_imported(folder: Path) -> None:
    script = (
        "import sys; from blobpipe import cli; status = cli.main(['quicklook', 'mistyped']); "
        "print(status, 'numpy' in sys.modules)"
    )
    ended = subprocess.run((sys.executable, "-c", script), capture_output=True, text=True)
    assert ended.stdout == "1 False\n"
    assert ended.stderr.startswith("blobpipe: mistyped: not found, expected a folder of images")
