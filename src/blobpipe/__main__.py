"""``python -m blobpipe``."""

import sys

from blobpipe.cli import main

sys.exit(main())
