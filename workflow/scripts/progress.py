"""What a run shows on the screen: a line for each job that starts, and how many jobs are done.

Snakemake prints a table of all jobs, four lines for each that has ended, and none that says what runs. Its own log, below
`.snakemake/log`, keeps all that.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from typing import Any

# What Snakemake reports of a run's steps, by its names of events; `Progress` says it in one line a job
STEPS = ("job_info", "job_started", "job_finished", "progress", "resources_info")

# Lines that tell a user nothing here, by their first words
IDLE = (
    "Assuming unrestricted shared filesystem",
    "Conda environments: ignored",
    "Select jobs to execute",
    "Using shell",
)

# Lines that point at what `quiet: rules` does not show
DANGLING = ("Some jobs were triggered by provenance", "Rules with provenance triggered jobs")
POINTER = "\n    (check individual jobs above for details)"

# Rules that only commit to DVC or gather files, by how their names begin
BOOKKEEPING = ("all", "dvc_", "stage_")

# Lines that are said once for a whole run, and not for each stage that DVC runs
ONCE = ("Building DAG of jobs", "Complete log", "Elapsed time")


class Progress(logging.Handler):
    """Pass on the start of each job in one line, and its end too if it runs elsewhere.

    Parameters
    ----------
    logger : Logger
        Snakemake's.
    remote : callable
        Whether jobs run elsewhere, on a cluster; known only once the run has begun.
    """

    def __init__(self, logger: logging.Logger, remote: Callable[[], bool]) -> None:
        super().__init__(logging.INFO)
        self.logger = logger
        self.remote = remote
        self.names: dict[int, str] = {}
        self.ended: list[str] = []
        self.done = 0
        self.total = 0

    def emit(self, record: logging.LogRecord) -> None:
        """Say that a job starts or, on a cluster, that it has ended."""
        about = vars(record)
        match getattr(record, "event", None):
            case "run_info":
                self.total = about["stats"]["total"]
            case "job_info" if not about["rule_name"].startswith(BOOKKEEPING):
                self.names[about["jobid"]] = name_of(about)
                self.say(self.names[about["jobid"]])
            case "job_finished" if self.remote() and about["job_id"] in self.names:
                self.ended.append(self.names[about["job_id"]])
            case "progress":
                self.done, self.total = about["done"], about["total"]
                for name in self.ended:
                    self.say(f"{name} has ended")
                self.ended.clear()
                if self.done == self.total:
                    self.say()

    def say(self, what: str = "") -> None:
        """Print the time, how many jobs are done, and what happens."""
        width = len(str(self.total))
        now = time.strftime("%H:%M:%S")
        self.logger.info(f"{now} [{self.done:{width}}/{self.total} done] {what}".rstrip())


def name_of(job: dict[str, Any]) -> str:
    """Name a job by its rule and what tells it from others of that rule, such as the number of its batch."""
    return " ".join([job["rule_name"], *map(str, job["wildcards"].values())])


class Screen(logging.Filter):
    """Keep off the screen what `Progress` says better, and what has nothing to say.

    Parameters
    ----------
    dry : bool
        Of a dry run the table of jobs is shown, once.
    inner : bool
        DVC runs this stage, and says so itself.
    """

    def __init__(self, *, dry: bool, inner: bool) -> None:
        super().__init__()
        self.tables_left = 1 if dry else 0
        self.hidden = (*IDLE, *DANGLING, *(ONCE if inner else ()))

    def filter(self, record: logging.LogRecord) -> bool:
        """Whether to show a line of Snakemake's."""
        match getattr(record, "event", None):
            case "run_info":
                self.tables_left -= 1
                return self.tables_left >= 0
            case event if event in STEPS:
                return False
        if isinstance(record.msg, str):
            record.msg = record.msg.replace(POINTER, "")
        return not str(record.msg).startswith(self.hidden)
