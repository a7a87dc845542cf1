"""`python -m cbam`, for where the command is not on the path; and what the command runs."""

import sys


def main() -> int:
    """Run the command line; Ctrl-C while it is still being imported ends it as later."""
    try:
        from cbam.app.cli import main as run
    except KeyboardInterrupt:
        exec("")  # see cbam/app/cli.py
        print("cbam: interrupted", file=sys.stderr)
        return 130
    return run()


if __name__ == "__main__":
    sys.exit(main())
