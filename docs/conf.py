"""Settings of Sphinx. Nothing here needs a network: formulae become MathML, and no other project's index is read."""

import sys
from pathlib import Path

DOCS = Path(__file__).parent
sys.path[:0] = [str(DOCS / "_ext"), str(DOCS.parent / "src")]

from blobpipe import __version__  # noqa: E402

project = "blobpipe"
author = "The blobpipe developers"
copyright = f"2026, {author}"  # noqa: A001
version = release = __version__

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "from_code",
    "offline_math",
    "timed",
]
exclude_patterns = ["_build"]
myst_enable_extensions = ["colon_fence", "deflist", "dollarmath"]
myst_heading_anchors = 3

autodoc_member_order = "bysource"
autodoc_typehints = "none"  # the docstrings give shapes and units, which types cannot
napoleon_google_docstring = False
napoleon_use_ivar = True
napoleon_use_rtype = False

html_theme = "furo"
html_title = f"blobpipe {version}"
html_math_renderer = "mathml"
html_show_sourcelink = False
# Short names that several classes share, as x and y, need no link.
suppress_warnings = ["ref.python"]
