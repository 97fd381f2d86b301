"""The command line: a command for each stage, as the rules call them, and those of every day.

Imports all other rooms, each where a command needs it.
Stages: all, as commands.
"""

# Everything heavy is imported by the command that needs it: `blobpipe --help` answers at once.
from blobpipe.cli.run import main

__all__ = ["main"]
