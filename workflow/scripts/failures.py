"""What is said of a job that failed: its rule, what the executor knows, and the end of its log.

`quiet: rules` in the profile, which spares the reader hundreds of paths a job, makes Snakemake hide failures too.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

# Lines of a log that are shown, the last ones
N_LINES = 20

# What an executor adds to each message, and a failed job's log shows better
ADVICE = (
    "For further error details see the cluster/cloud log and the log files of the involved rule(s)."
)


class Failures(logging.Handler):
    """Pass on failures of jobs in a few lines."""

    def __init__(self, logger: logging.Logger) -> None:
        super().__init__(logging.ERROR)
        self.logger = logger
        self.started = time.time()

    def emit(self, record: logging.LogRecord) -> None:
        """Say what is known of a job, or a group of jobs, that has failed."""
        about = vars(record)
        match getattr(record, "event", None):
            case "job_error" if not about.get("indent"):
                self.logger.error("\n".join(self.of_job(about)))
            case "group_error":
                self.logger.error("\n".join(self.of_group(about)))

    def of_job(self, job: dict[str, Any]) -> Iterator[str]:
        """Yield the lines about a job.

        Parameters
        ----------
        job : dict
            Its record in Snakemake's log: ``rule_name``, ``rule_msg``, ``log`` (the executor's own last).
        """
        message = " ".join((job.get("rule_msg") or "").replace(ADVICE, "").split())
        yield f"Error in rule {job['rule_name']}{': ' if message else ''}{message}"
        yield from self._ends_of(job["log"])

    def of_group(self, group: dict[str, Any]) -> Iterator[str]:
        """Yield the lines about jobs that run as one, of which Snakemake does not know the one that failed.

        Parameters
        ----------
        group : dict
            Its record in Snakemake's log: ``job_error_info``, a list of what `of_job` takes, and ``aux_logs``.
        """
        jobs = group["job_error_info"]
        yield f"Error in one of the rules {', '.join(job['rule_name'] for job in jobs)}"
        # The job that failed is the last that wrote anything
        logs = [path for job in jobs for path in job["log"]]
        yield from self._ends_of([*reversed(logs), *group["aux_logs"]])

    def _ends_of(self, logs: list[str | None]) -> Iterator[str]:
        """Yield where the logs are, and the last lines of the first that this run has written: it says most."""
        shown: list[str] = []
        for path in map(Path, filter(None, logs)):
            yield f"    log: {path}"
            if not shown and path.is_file() and path.stat().st_mtime >= self.started:
                lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
                shown = [f"        {line}" for line in lines[-N_LINES:]]
                yield from shown
