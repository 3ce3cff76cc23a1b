"""``python -m wcr_fast`` is the command ``wcr-fast``."""

import sys

from wcr_fast.cli import main

sys.exit(main())
