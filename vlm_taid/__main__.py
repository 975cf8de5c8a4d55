"""``python -m vlm_taid``: the command."""

import sys

from vlm_taid.cli import main

sys.exit(main())
