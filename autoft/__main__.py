"""`python -m autoft` is `autoft`."""

from __future__ import annotations

import sys

from autoft.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
