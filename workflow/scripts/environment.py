"""Which code and which tools the jobs of a Snakemake run use."""

from __future__ import annotations

import os
import sys
from pathlib import Path


def use_project(root: str) -> None:
    """Let jobs run this folder's code with the tools beside this interpreter.

    The code that runs is then the code that is recorded, also in a clone or in the copy that an experiment makes of the
    project; and ``.venv/bin/snakemake`` works where no environment is activated.
    """
    os.environ["PYTHONPATH"] = f"{root}/src"
    tools = str(Path(sys.executable).parent)
    if tools not in os.environ["PATH"].split(os.pathsep):
        os.environ["PATH"] = f"{tools}{os.pathsep}{os.environ['PATH']}"
