"""``python -m lightning_sketch``: the command line."""

import sys

from lightning_sketch.cli import main

if __name__ == "__main__":
    sys.exit(main())
