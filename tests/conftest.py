"""A short simulated campaign and its difference images, made once for all tests that want real pixels' troubles."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import HealthCheck, Phase, settings

from blobpipe.params import Campaign, Difference

# The same examples on every run and machine, however busy it is.
settings.register_profile(
    "blobpipe",
    derandomize=True,
    database=None,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow],
)
# The same, but a failure is not made smaller: for those who only ask whether there is one (tests/mutants.py).
settings.register_profile(
    "mutants", settings.get_profile("blobpipe"), phases=(Phase.explicit, Phase.generate)
)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "blobpipe"))


Once = Callable[[str, Callable[[Path], None]], Path]


@pytest.fixture(scope="session")
def once(tmp_path_factory: pytest.TempPathFactory) -> Once:
    """Makes a folder that all workers share (``pytest -n 2``): one of them makes it, the others wait."""
    base = tmp_path_factory.getbasetemp()
    shared = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "shared"
    shared.mkdir(exist_ok=True)

    def made(name: str, make: Callable[[Path], None]) -> Path:
        with open(shared / f"{name}.lock", "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not (shared / name).exists():
                make(shared / f"{name}.part")
                (shared / f"{name}.part").rename(shared / name)
        return shared / name

    return made


@pytest.fixture(scope="session")
def campaign_params() -> Campaign:
    """36 images, 12 of them historical cases, and many CSM shifts."""
    return Campaign(n_frames=36, first_frames=16, n_cases=12, large_shift_frac=0.3)


@pytest.fixture(scope="session")
def difference_params() -> Difference:
    """A stack that leaves 20 of them with a difference image."""
    return Difference(stack_size=16)


@pytest.fixture(scope="session")
def campaign_dir(once: Once, campaign_params: Campaign) -> Path:
    """Its images and tables, as in ``data/raw``; only for reading."""
    from blobpipe.simulation import campaign

    return once("campaign", lambda folder: campaign.simulate(folder, campaign_params))


@pytest.fixture(scope="session")
def difference_dir(once: Once, campaign_dir: Path, difference_params: Difference) -> Path:
    """Its difference images and reference stack, as in ``data/difference``; only for reading."""
    from blobpipe.images import difference

    def make(folder: Path) -> None:
        difference.reference(campaign_dir, folder, difference_params)
        difference.write_differences(campaign_dir, folder, difference_params)

    return once("difference", make)
