"""``python -m llmnb.cli``."""

import sys

from . import main

sys.exit(main())
