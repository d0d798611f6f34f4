"""`python -m llmsurgery`, and the entry point of the `llmsurgery` command."""

from __future__ import annotations


def main() -> None:
    """Run the command line and exit with its code."""
    import sys

    from llmsurgery.cli.app import run

    sys.exit(run(sys.argv[1:]))


if __name__ == "__main__":
    main()
