"""Dates of exposures, from the cards of their headers."""

from __future__ import annotations

import time

import numpy as np
import pytest
from astropy.io import fits

from blobpipe.core import fits_images
from blobpipe.core.dates import exposure_mjd, is_date
from blobpipe.errors import FrameError


def _dated(cards: dict[str, object]) -> float:
    return exposure_mjd(fits_images.Frame("f", np.zeros((2, 2), np.float32), cards, ""), "f.fits")


@pytest.mark.parametrize(
    ("cards", "mjd"),
    [
        ({"EXPSTART": 60000.25, "DATE-OBS": "2012-01-01"}, 60000.25),
        ({"EXPSTART": "60000.25"}, 60000.25),
        ({"DATE-OBS": "2023-02-25", "TIME-OBS": "06:00:00"}, 60000.25),
        ({"DATE-OBS": "2023-02-25"}, 60000.0),
        ({"DATE-OBS": "2012-09-27T06:00:00.500"}, 56197.25 + 0.5 / 86400),
        ({"DATE-OBS": "2012-09-27T06:00:00.500Z"}, 56197.25 + 0.5 / 86400),
        ({"DATE-OBS": "2012-09-27T06:00:00.5", "TIME-OBS": "06:00:00.5"}, 56197.25 + 0.5 / 86400),
        ({"DATE-OBS": " 2012-09-27 06:00:00 "}, 56197.25),
        ({"DATE-OBS": "2012-09-27T06:00"}, 56197.25),
        ({"DATE-OBS": "2012-09-27", "TIME-OBS": "06:00:00Z"}, 56197.25),
        ({"DATE-OBS": "2012-09-27", "TIME-OBS": ""}, 56197.0),
        ({"DATE-OBS": "2016-12-31T23:59:60"}, 57754.0),
        ({"DATE-BEG": "2012-09-27T06:00:00"}, 56197.25),
        ({"MJD-OBS": 56197.25}, 56197.25),
        ({"MJD-AVG": 56197.25}, 56197.25),
        ({"EXPSTART": "", "DATE-OBS": "2012-09-27", "TIME-OBS": "06:00:00"}, 56197.25),
        ({"EXPSTART": "N/A", "MJD-OBS": 56197.25}, 56197.25),
        ({"EXPSTART": 2456197.75, "DATE-OBS": "2012-09-27T06:00:00"}, 56197.25),
        ({"EXPSTART": 0.0, "MJD-OBS": True, "DATE-OBS": "soon", "DATE-BEG": "2012-09-27"}, 56197.0),
    ],
)
def test_the_date_of_an_exposure(cards: dict[str, object], mjd: float) -> None:
    assert _dated(cards) == pytest.approx(mjd, abs=1e-9)


@pytest.mark.parametrize(
    "cards",
    [
        *(
            {"EXPSTART": value}
            for value in (2460006.5, 1677373200.0, "NaN", "inf", 0.0, -1, 54000.0, 99999.0, True)
        ),
        *(
            {"DATE-OBS": text}
            for text in (
                "27/09/97",
                "2012-13-01",
                "2012-09-27T25:00:00",
                "2012-09-27X",
                "1997-09-27",
            )
        ),
        *(
            {"DATE-OBS": text}
            for text in ("2099-01-01", "2012-09-27T06:00:00+02:00", "2012-W39-4", "20120927")
        ),
        {"DATE-OBS": "2012-09-27", "TIME-OBS": "noon"},
    ],
    ids=str,
)
def test_a_date_that_is_none_is_refused_with_what_was_found(cards: dict[str, object]) -> None:
    card, value = next(iter(cards.items()))
    with pytest.raises(
        FrameError,
        match=r"f\.fits: no date of the exposure, found .* from MJD 54960 .* to tomorrow \(20.*this machine's clock",
    ) as caught:
        _dated(cards)
    assert f"{card} {str(value)!r}" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_the_limits_of_dates_are_the_instruments_life_and_tomorrow() -> None:
    now = time.time() / 86400 + 40587
    assert [is_date(mjd) for mjd in (54959, 54961, now, now + 0.9, now + 1.1)] == [
        False,
        True,
        True,
        True,
        False,
    ]
    assert not any(is_date(mjd) for mjd in (None, np.nan, np.inf, -np.inf))
    with pytest.raises(FrameError, match="no date of the exposure, expected EXPSTART, MJD-OBS"):
        _dated({"EXPSTART": "  "})


def test_an_exposure_without_a_date_is_named() -> None:
    frame = fits_images.Frame(
        "f", np.zeros((2, 2), np.float32), fits.Header({"EXPSTART": "soon"}), ""
    )
    with pytest.raises(
        FrameError,
        match=r"f.fits: no date of the exposure, found EXPSTART 'soon', expected EXPSTART",
    ):
        exposure_mjd(frame, "f.fits")
