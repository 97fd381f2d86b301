"""Constants of the WFC3/IR detector, and of the dates that its images can have."""

from __future__ import annotations

from datetime import datetime

# Side of a full frame with its reference pixels (px); WFC3 Instrument Handbook, section 5.7
SIDE_PX = 1024

# Width of the frame of reference pixels, which FLT files leave out (px); WFC3 Data Handbook
BORDER_PX = 5

# Side of a full frame without its reference pixels, as in FLT files (px): 1014
LIGHT_SIDE_PX = SIDE_PX - 2 * BORDER_PX

# Zero of the modified Julian date; IAU
MJD_ZERO = datetime(1858, 11, 17)

# 1970-01-01, the zero of the system's clock (MJD)
UNIX_MJD = 40587.0

# Lowest date of an exposure (MJD): 2009-05-09, two days before the launch of the instrument
FIRST_MJD = 54960.0

# Range of dates in tables (MJD), 1858 to 2132; Julian dates and times in seconds lie beyond it
MJD_RANGE = (0.0, 100_000.0)
