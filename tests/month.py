"""A month of the daily routine, killed at random moments, against a mail server and a webhook on this machine.

    python -m tests.month --kills 50 --images 60 --seed 1

Images are dropped one by one into a folder that ``blobpipe quicklook --watch`` watches; the process is killed
(SIGKILL) again and again and started anew. In the end every image must be in the log once, the servers must have
accepted every notice once, and the log must equal that of an undisturbed run of the same month.

A kill between a server's acceptance and the commit makes the next run send the notice again under the same id. Such
repetitions are counted; a receiver knows them by the id.
"""

from __future__ import annotations

import argparse
import fcntl
import hashlib
import io
import os
import signal
import sqlite3
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from astropy.io import fits
from tqdm import tqdm

from blobpipe.monitor import delivery, logbook, notices
from blobpipe.params import Health, Notices, Params, Quicklook, to_yaml
from tests.servers import Hook, HookServer, Mailbox, MailServer
from tests.unit.quicklook.days import KNOWN, SETTINGS, STACK, pixels

NEW = tuple(
    (x, y, 6.0, 0.08) for x, y in ((300, 200), (150, 260), (430, 90), (330, 440), (60, 440))
)
EVERY_DAYS = 12  # a new blob
# One that only several images together show, from this day on
FAINT = (230, 60, 6.0, 0.0035)
FAINT_DAY = 22
SPECIAL = ("cut", "duplicate", "renamed", "late", "growing")
SPECIAL_OF_A_LONG_MONTH = (
    *SPECIAL,
    "text",
    "undated",
    "mended",
    "growing",
    "late",
    "growing",
    "cut",
)
# a growing file is written in so many pieces
SETTLE_S = 0.5
PIECE_S = 0.08
PIECES = 12
ANSWER_S = 0.1  # how long the servers take
TABLES = (
    "images",
    "files",
    "subframes",
    "candidates",
    "detections",
    "depths",
    "nearly_found",
    "peaks",
    "pictures",
    "reviews",
    "notices",
    "health",
    "corrections",
)
DIFFERENT = {  # times, and what counts runs and attempts
    "images": {"run", "logged"},
    "files": {"seen", "modified_ns", "changed_ns", "inode"},
    "notices": {"created", "sent", "next_attempt", "attempts", "error"},
}
PHASES = ("starting", "watching", "searching", "writing", "sending")


# --- the month -------------------------------------------------------------------------------------------------------


def plan(images: int, rng: np.random.Generator) -> list[str]:
    """What kind of file comes on each day: first a stack, at last a plain image."""
    special = SPECIAL_OF_A_LONG_MONTH if images >= 30 else SPECIAL
    free = images - STACK - 3
    if free < len(special):
        raise SystemExit(
            f"a month of {images} images: expected at least {STACK + 3 + len(special)}"
        )
    rest = [*special, *["plain"] * (free - len(special))]
    rng.shuffle(rest)
    return [*["plain"] * (STACK + 2), *rest, "plain"]


def content(day: int, kind: str = "plain") -> bytes:
    """An image as a FITS file; one that is late is of two and a half days before its day."""
    mjd = day - 2.5 if kind == "late" else day
    blobs = [blob for k, blob in enumerate(NEW) if STACK + 1 + EVERY_DAYS * k <= mjd]
    blobs += [FAINT] * (mjd >= FAINT_DAY)
    date = {} if kind == "undated" else {"EXPSTART": 60000.0 + mjd}
    buffer = io.BytesIO()
    fits.PrimaryHDU(
        pixels(day, (*KNOWN, *blobs)), fits.Header({"FILTER": "F153M", **date})
    ).writeto(buffer)
    whole = buffer.getvalue()
    return whole[:200_000] if kind == "cut" else b"not an image" if kind == "text" else whole


def put(path: Path, data: bytes) -> None:
    """Have a file appear at once."""
    part = path.with_name(f".{path.name}.part")
    part.write_bytes(data)
    os.replace(part, path)


def let_grow(path: Path, data: bytes) -> None:
    """Write a file slowly, as a poor connection does."""
    size = -(-len(data) // PIECES)
    with open(path, "wb", buffering=0) as file:
        for start in range(0, len(data), size):
            file.write(data[start : start + size])
            time.sleep(PIECE_S)


@dataclass
class Folder:
    """The watched folder, and what the log must come to hold of it."""

    path: Path
    dropped: set[tuple[str, str]] = field(default_factory=set)
    last: str = ""

    def note(self, name: str, data: bytes) -> None:
        """Expect a file in the log."""
        self.dropped.add((name, hashlib.sha256(data).hexdigest()))

    def drop(self, day: int, kind: str) -> None:
        """The file of a day; of a mended one, the half that comes first."""
        name = f"day{day:03d}.fits"
        match kind:
            case "duplicate":
                name = f"copy{day:03d}.fits"
                data = (self.path / self.last).read_bytes()
                put(self.path / name, data)
            case "renamed":
                name = f"moved{day:03d}.fits"
                data = (self.path / "day001.fits").read_bytes()
                (self.path / "day001.fits").rename(self.path / name)
            case "growing":
                data = content(day)
                threading.Thread(target=let_grow, args=(self.path / name, data)).start()
            case "mended":
                data = content(day, "cut")
                put(self.path / name, data)
            case _:
                data = content(day, kind)
                put(self.path / name, data)
        self.note(name, data)
        if kind == "plain":
            self.last = name

    def mend(self, day: int) -> None:
        """Replace the half file of a day by the whole one."""
        data = content(day)
        put(self.path / f"day{day:03d}.fits", data)
        self.note(f"day{day:03d}.fits", data)


# --- the routine, and the servers ------------------------------------------------------------------------------------


@dataclass
class Run:
    """A watch over a folder, with the kills that it is to suffer."""

    root: Path
    environ: dict[str, str]
    deadline: float
    rng: np.random.Generator
    kills_on_letter: int = 0
    start_s: float = 8.0
    process: subprocess.Popen[bytes] | None = None
    log: sqlite3.Connection | None = None
    started: float = 0.0
    runs: int = 0
    letter: threading.Event = field(default_factory=threading.Event)
    phases: Counter[str] = field(default_factory=Counter)

    def start(self) -> None:
        """Start the watch."""
        command = (
            sys.executable,
            "-m",
            "blobpipe",
            "quicklook",
            "in",
            "--log",
            "out/log.sqlite",
            "--watch",
        )
        with open(self.root / "said.txt", "ab") as said:
            self.process = subprocess.Popen(
                command, cwd=self.root, env=self.environ, stdout=said, stderr=said
            )
        self.started = time.monotonic()

    @property
    def ready(self) -> bool:
        """Whether the process that runs has opened the log."""
        return self.count("runs") > self.runs

    def count(self, table: str, where: str = "1") -> int:
        """Rows of a table."""
        if self.log is None and (self.root / "out" / "log.sqlite").exists():
            self.log = sqlite3.connect(
                self.root / "out" / "log.sqlite", timeout=0, isolation_level=None
            )
        try:
            return (
                int(self.log.execute(f"SELECT count(*) FROM {table} WHERE {where}").fetchone()[0])
                if self.log
                else 0
            )
        except sqlite3.OperationalError:  # not there yet, or busy
            return 0

    def stop(self) -> str:
        """Kill the process; what it was doing. It is frozen first, so that there is time to look."""
        assert self.process is not None
        os.kill(self.process.pid, signal.SIGSTOP)
        _, status = os.waitpid(self.process.pid, os.WUNTRACED)
        if not os.WIFSTOPPED(status):
            raise SystemExit(f"the watch ended by itself:\n{self.said()}")
        phase = self._phase()
        os.kill(self.process.pid, signal.SIGKILL)
        self.process.wait()
        return phase

    def _phase(self) -> str:
        if not self.ready:
            return "starting"
        searching, sending = (
            _held(self.root / "out" / f"log.{lock}") for lock in ("lock", "sending")
        )
        if sending:
            return "sending"
        if searching:
            return "writing" if self._writing() else "searching"
        return "watching"

    def _writing(self) -> bool:
        assert self.log is not None
        try:
            self.log.execute("BEGIN IMMEDIATE")
        except sqlite3.OperationalError:
            return True
        self.log.execute("ROLLBACK")
        return False

    def kill(self) -> None:
        """Kill the process, and start it anew."""
        self.phases[self.stop()] += 1
        self.runs = self.count("runs")
        self.letter.clear()
        self.start()

    def kill_sometime(self) -> None:
        """Kill it at a moment between now and when it has searched what there is; half of the kills let it start."""
        if self.rng.random() < 0.5:
            self.until(lambda: self.ready)
        left = 0.0 if self.ready else self.start_s - (time.monotonic() - self.started)
        end = time.monotonic() + self.rng.uniform(0, max(left, 0.0) + 2.0)
        self.until(lambda: time.monotonic() >= end)
        self.kill()

    def until(self, true: Callable[[], bool], pause_s: float = 0.01) -> None:
        """Wait, and meanwhile kill the process while a server reads a letter, or just afterwards."""
        while not true():
            if time.monotonic() > self.deadline:
                raise SystemExit(f"the time limit was reached; the watch said:\n{self.said()}")
            if self.letter.is_set() and self.kills_on_letter:
                self.letter.clear()
                if self.rng.random() < 0.7:
                    time.sleep(self.rng.uniform(0, 1.5 * ANSWER_S))
                    self.kills_on_letter -= 1
                    self.kill()
            if self.process is not None and self.process.poll() is not None:
                raise SystemExit(f"the watch ended by itself:\n{self.said()}")
            time.sleep(pause_s)

    def said(self) -> str:
        """The last of what the process said."""
        return (self.root / "said.txt").read_text()[-3000:]


def _held(lock: Path) -> bool:
    """Whether some process holds a lock."""
    if not lock.exists():
        return False
    with open(lock, "a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False


@dataclass(frozen=True)
class Received:
    """What the servers have accepted: subjects by channel and id, and how often an id came again."""

    letters: dict[tuple[str, str], set[str]]
    repeated: int


def _received(box: Mailbox, hook: Hook) -> Received:
    came = [
        ("mail", letter["Message-ID"][1:].partition("@")[0], str(letter["Subject"]))
        for letter in box.taken
    ]
    came += [("webhook", letter["id"], letter["text"].splitlines()[0]) for letter in hook.taken]
    letters: dict[tuple[str, str], set[str]] = {}
    for channel, number, subject in came:
        letters.setdefault((channel, number), set()).add(subject)
    return Received(letters, len(came) - len(letters))


@dataclass(frozen=True)
class Outcome:
    """What one run of the month led to."""

    root: Path
    folder: Folder
    received: Received
    phases: Counter[str]
    seconds: float
    start_s: float


def run_month(
    root: Path, kinds: list[str], kills: int, seed: int, *, deadline: float, start_s: float = 8.0
) -> Outcome:
    """Let the routine live through the month."""
    begun = time.monotonic()
    rng = np.random.default_rng([seed, kills])
    box = Mailbox()
    hook = Hook()
    on_letter = kills // 4
    at_day = Counter(rng.integers(0, len(kinds), kills - on_letter).tolist())
    (root / "in").mkdir(parents=True)
    folder = Folder(root / "in")
    with ExitStack() as stack:
        mail = stack.enter_context(MailServer(box))
        web = stack.enter_context(HookServer(hook))
        (root / "params.yaml").write_text(to_yaml(_settings(mail.port)))
        run = Run(root, os.environ | {delivery.WEBHOOK: web.url}, deadline, rng, on_letter, start_s)
        box.on_letter = hook.on_letter = lambda: (run.letter.set(), time.sleep(ANSWER_S))[1]
        run.start()
        stack.callback(_end, run)
        run.until(lambda: run.ready)
        first_s = time.monotonic() - run.started
        for day, kind in enumerate(tqdm(kinds, f"{kills} kills", unit="image", disable=None)):
            if kind != "plain":
                _wait_for_all(run, folder)
            folder.drop(day, kind)
            for _ in range(at_day[day]):
                run.kill_sometime()
            if kind == "mended":
                _wait_for_all(run, folder)
                folder.mend(day)
            if kind != "plain":
                _wait_for_all(run, folder)
        while run.kills_on_letter:  # fewer letters came than were to be killed
            run.kills_on_letter -= 1
            run.kill_sometime()
        _wait_for_all(run, folder)
        run.until(lambda: run.count("notices", "state = 'waiting'") == 0)
    return Outcome(
        root, folder, _received(box, hook), run.phases, time.monotonic() - begun, first_s
    )


def _settings(mail_port: int) -> Params:
    section = Notices(
        mail_to=("team@example.org",),
        mail_from="blobs@example.org",
        smtp_host="127.0.0.1",
        smtp_port=mail_port,
        security="none",
        webhook=True,
        first_wait_s=0.5,
        longest_wait_s=2.0,
        attempts=1000,
    )
    more = {
        "quicklook": Quicklook(settle_s=SETTLE_S),
        "health": Health(window=5),
        "notices": section,
    }
    return SETTINGS.model_copy(update=more)


def _wait_for_all(run: Run, folder: Folder) -> None:
    """Until the log knows every file that was dropped."""

    def known() -> bool:
        if run.count("files") < len(folder.dropped):
            return False
        assert run.log is not None
        rows = run.log.execute("SELECT path, sha256 FROM files").fetchall()
        return folder.dropped <= {(Path(path).name, sha256) for path, sha256 in rows}

    run.until(known, 0.02)


def _end(run: Run) -> None:
    assert run.process is not None
    if run.process.poll() is None:
        run.process.kill()
        run.process.wait()
    if run.log is not None:
        run.log.close()


# --- what must be true in the end ------------------------------------------------------------------------------------


def state(root: Path) -> dict[str, list[tuple[Any, ...]]]:
    """The rows of a log, without what differs between two runs of the same month."""
    log = logbook.connect(root / "out" / "log.sqlite")
    found = {}
    for table in TABLES:
        rows = sorted(
            map(dict, log.execute(f"SELECT * FROM {table}")),
            key=lambda row: tuple(row.values())[:3],
        )
        for row in rows:
            named = {"images": "reason", "files": "path"}.get(table)
            if named:
                row[named] = row[named].replace(str(root.resolve()), "")
        found[table] = [
            tuple(v for k, v in row.items() if k not in DIFFERENT.get(table, ())) for row in rows
        ]
    log.close()
    return found


def faults(outcome: Outcome) -> list[str]:
    """What is wrong after a month; empty if nothing is."""
    log = logbook.connect(outcome.root / "out" / "log.sqlite")
    contents = Counter({sha256: 1 for _, sha256 in outcome.folder.dropped})
    logged = Counter(row["sha256"] for row in log.execute("SELECT sha256 FROM images"))
    identity = log.execute("SELECT id FROM identity").fetchone()["id"]
    rows = log.execute("SELECT * FROM notices").fetchall()
    told = {
        (row["channel"], notices._digested(f"{identity} {row['key']}")): {row["subject"]}
        for row in rows
    }
    sound = [row[0] for row in log.execute("PRAGMA integrity_check")] == ["ok"]
    checks = {
        "an image is missing in the log, or there twice": logged == contents,
        "a notice was not sent": all(row["state"] == "sent" for row in rows),
        "the servers have not accepted each notice once": outcome.received.letters == told,
        "there were no notices": bool(rows),
        "the database is damaged": sound and not log.execute("PRAGMA foreign_key_check").fetchall(),
    }
    log.close()
    return [fault for fault, good in checks.items() if not good]


def differences(one: Path, other: Path) -> list[str]:
    """Where two logs differ: a line for each table that does."""
    lines = []
    mine = state(one)
    theirs = state(other)
    for table in TABLES:
        if mine[table] != theirs[table]:
            pairs = zip(mine[table], theirs[table], strict=False)
            first = next(((a, b) for a, b in pairs if a != b), ("more rows", "fewer rows"))
            lines.append(
                f"{table}: {len(mine[table])} and {len(theirs[table])} rows; {str(first)[:600]}"
            )
    return lines


@dataclass(frozen=True)
class Summary:
    """Of the whole: the undisturbed run, the other one, and what is wrong."""

    quiet: Outcome
    disturbed: Outcome
    faults: list[str]

    def __str__(self) -> str:
        found = state(self.disturbed.root)
        outcomes = _outcomes(self.disturbed.root, "images")
        files = _outcomes(self.disturbed.root, "files")
        channels = Counter(channel for channel, _ in self.disturbed.received.letters)
        return "\n".join(
            [
                f"images in the log: {len(found['images'])} ({_listed(outcomes)})",
                f"files in the log: {len(found['files'])} ({_listed(files)})",
                f"kills: {self.disturbed.phases.total()} "
                f"({', '.join(f'{phase} {self.disturbed.phases[phase]}' for phase in PHASES)})",
                f"notices accepted: {channels.total()} ({_listed(channels)})",
                f"sent again under the same id: {self.disturbed.received.repeated} "
                f"(undisturbed {self.quiet.received.repeated})",
                f"seconds: {self.disturbed.seconds:.0f} (undisturbed {self.quiet.seconds:.0f})",
                f"rows compared: {sum(map(len, found.values()))} in {len(TABLES)} tables",
                *(f"FAULT: {fault}" for fault in self.faults),
                "all is well" if not self.faults else f"{len(self.faults)} faults",
            ]
        )


def _outcomes(root: Path, table: str) -> Counter[str]:
    log = logbook.connect(root / "out" / "log.sqlite")
    found = Counter(row["outcome"] for row in log.execute(f"SELECT outcome FROM {table}"))
    log.close()
    return found


def _listed(counts: Counter[str]) -> str:
    return ", ".join(f"{name} {count}" for name, count in sorted(counts.items()))


def month(root: Path, kills: int, images: int, seed: int, limit_s: float = 1200.0) -> Summary:
    """Both runs of a month, compared."""
    deadline = time.monotonic() + limit_s
    kinds = plan(images, np.random.default_rng(seed))
    quiet = run_month(root / "quiet", kinds, 0, seed, deadline=deadline)
    disturbed = run_month(
        root / "disturbed", kinds, kills, seed, deadline=deadline, start_s=quiet.start_s
    )
    wrong = [f"undisturbed: {fault}" for fault in faults(quiet)] + faults(disturbed)
    wrong += [f"the logs differ: {line}" for line in differences(quiet.root, disturbed.root)]
    if disturbed.phases.total() != kills:
        wrong.append(f"{disturbed.phases.total()} kills, expected {kills}")
    if disturbed.received.repeated > disturbed.phases["sending"] or quiet.received.repeated:
        wrong.append("a notice came again without a kill while it was sent")
    return Summary(quiet, disturbed, wrong)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--images", type=int, default=60)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument(
        "--limit-s", type=float, default=1200.0, help="of the whole (default: 1200)"
    )
    parser.add_argument("--keep", type=Path, metavar="FOLDER", help="leave both runs there")
    args = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # no watch is left behind
    with ExitStack() as stack:
        root = args.keep or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        summary = month(root, args.kills, args.images, args.seed, args.limit_s)
        print(summary)
        sys.exit(bool(summary.faults))


if __name__ == "__main__":
    main()
