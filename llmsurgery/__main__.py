"""`python -m llmsurgery`, and the entry point of the `llmsurgery` command."""

from __future__ import annotations


def main() -> None:
    """Run the command line and exit with its code."""
    import sys

    try:
        from llmsurgery.cli.app import run

        code = run(sys.argv[1:])
    except KeyboardInterrupt:
        # While modules were imported, or for a second time while the first was answered.
        sys.stderr.write("error: interrupted\n")
        code = 130
    sys.exit(code)


if __name__ == "__main__":
    main()
