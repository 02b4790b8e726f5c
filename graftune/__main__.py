"""`python -m graftune`, and with several processes `accelerate launch -m graftune`."""

from __future__ import annotations

import sys

from graftune.cli import main

if __name__ == "__main__":
    sys.exit(main())
