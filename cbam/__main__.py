"""`python -m cbam`, for when the command is not on the path; also the entry point of the command."""

import sys


def main() -> int:
    """Run the command line; Ctrl-C during its import ends it in the same way as later."""
    try:
        from cbam.app.cli import main as run
    except KeyboardInterrupt:
        exec("")  # see cbam/app/cli.py
        print("cbam: interrupted", file=sys.stderr)
        return 130
    return run()


if __name__ == "__main__":
    sys.exit(main())
