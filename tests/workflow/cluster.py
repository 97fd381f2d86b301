"""A SLURM of one node on this machine, for one user, that nothing outside it can see."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from .conftest import environment

COMMANDS = ("munged", "slurmctld", "slurmd", "sbatch", "squeue", "sinfo", "srun")

# Debian keeps daemons where the path of a plain user does not lead
PATH = f"{environment()['PATH']}:/usr/sbin:/sbin"

CONFIGURATION = """\
ClusterName=tests
SlurmctldHost={host}(127.0.0.1)
SlurmUser={user}
SlurmdUser={user}
AuthInfo=socket={folder}/munge.socket
CommunicationParameters=NoCtldInAddrAny,NoInAddrAny
SlurmctldPort={ports[0]}
SlurmdPort={ports[1]}
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
KillWait=2
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
NodeName={host} NodeAddr=127.0.0.1 CPUs={cpus} RealMemory={memory_mb}
PartitionName=main Nodes={host} Default=YES MaxTime=1-00:00:00
PartitionName=short Nodes={host} MaxTime=5
"""


def missing() -> str:
    """The command that is not installed here, if any: then there is no cluster."""
    return next((name for name in COMMANDS if not shutil.which(name, path=PATH)), "")


@contextmanager
def one_node(folder: Path) -> Iterator[dict[str, str]]:
    """Run a SLURM of one node; the environment in which its commands find it."""
    host = socket.gethostname().partition(".")[0]
    configuration = folder / "slurm.conf"
    for name in ("state", "spool", "bin"):
        (folder / name).mkdir(parents=True)
    folder.chmod(0o755)
    configuration.write_text(
        CONFIGURATION.format(
            folder=folder,
            host=host,
            user=subprocess.check_output(["id", "-un"], text=True).strip(),
            ports=free_ports(2),
            cpus=os.cpu_count(),
            memory_mb=os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2**20,
        )
    )
    # The executor takes SLURM's variables away from its job steps
    step = folder / "bin/srun"
    real = shutil.which("srun", path=PATH)
    step.write_text(f'#!/bin/sh\nSLURM_CONF={configuration} exec {real} "$@"\n')
    step.chmod(0o755)
    env = {"SLURM_CONF": str(configuration), "PATH": f"{folder}/bin:{PATH}"}
    daemons = [
        _start("munged", "--foreground", *_munge(folder), env=env),
        _start("slurmctld", "-D", env=env),
        _start("slurmd", "-D", env=env),
    ]
    try:
        _wait_until_idle(env)
        yield env
    finally:
        for daemon in reversed(daemons):
            daemon.send_signal(signal.SIGTERM)
            daemon.wait(30)


def _munge(folder: Path) -> list[str]:
    """Options of munged, with a key of its own."""
    key = folder / "munge.key"
    key.touch(mode=0o600)
    key.write_bytes(os.urandom(128))
    return [
        "--force",
        f"--key-file={key}",
        f"--socket={folder}/munge.socket",
        *(f"--{name}-file={folder}/munged.{name}" for name in ("pid", "log", "seed")),
    ]


def _start(*words: str, env: dict[str, str]) -> subprocess.Popen[bytes]:
    """Start a daemon that stays in the foreground, with its own log."""
    program = shutil.which(words[0], path=PATH)
    assert program
    return subprocess.Popen(
        [program, *words[1:]],
        env={**os.environ, **env},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )


def _wait_until_idle(env: dict[str, str]) -> None:
    """Wait until the node takes jobs."""
    for _ in range(150):
        asked = subprocess.run(
            ["sinfo", "--noheader", "--format=%T"],
            env={**os.environ, **env},
            check=False,
            capture_output=True,
            text=True,
        )
        if "idle" in asked.stdout:
            return
        time.sleep(0.2)
    raise TimeoutError(f"SLURM did not start: {asked.stdout} {asked.stderr}")


def free_ports(n: int) -> list[int]:
    """Ports that nobody listens on."""
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(n)]
    ports = [each.getsockname()[1] for each in sockets]
    for each in sockets:
        each.close()
    return ports
