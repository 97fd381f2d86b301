"""A short simulated campaign and its difference images, made once for all tests that want real pixels' troubles."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

from blobpipe.params import Campaign, Difference

# The same examples on every run and machine, however busy it is.
settings.register_profile(
    "blobpipe", derandomize=True, database=None, deadline=None, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("blobpipe")


@pytest.fixture(scope="session")
def campaign_params() -> Campaign:
    """36 images, 12 of them historical cases, and many CSM shifts."""
    return Campaign(n_frames=36, first_frames=16, n_cases=12, large_shift_frac=0.3)


@pytest.fixture(scope="session")
def difference_params() -> Difference:
    """A stack that leaves 20 of them with a difference image."""
    return Difference(stack_size=16)


@pytest.fixture(scope="session")
def campaign_dir(tmp_path_factory: pytest.TempPathFactory, campaign_params: Campaign) -> Path:
    """Its images and tables, as in ``data/raw``; only for reading."""
    from blobpipe import campaign

    folder = tmp_path_factory.mktemp("campaign")
    campaign.simulate(folder, campaign_params)
    return folder


@pytest.fixture(scope="session")
def difference_dir(tmp_path_factory: pytest.TempPathFactory, campaign_dir: Path, difference_params: Difference) -> Path:
    """Its difference images and reference stack, as in ``data/difference``; only for reading."""
    from blobpipe import difference

    folder = tmp_path_factory.mktemp("difference")
    difference.reference(campaign_dir, folder, difference_params)
    difference.subtract(campaign_dir, folder, difference_params)
    return folder


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Of several workers (``pytest -n 2 --dist loadgroup``), let one alone make the campaign."""
    for item in items:
        if "campaign_dir" in getattr(item, "fixturenames", ()):
            item.add_marker(pytest.mark.xdist_group("campaign"))
