"""Runs the command line: ``python -m resmerge_stream``."""

import sys

from .cli.main import main

if __name__ == "__main__":
    sys.exit(main())
