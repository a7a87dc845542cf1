"""`python -m cbam`, for where the command is not on the path."""

import sys

from cbam.app.cli import main

if __name__ == "__main__":
    sys.exit(main())
