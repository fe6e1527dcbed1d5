"""Runs the command line as `python -m hf_deformvos`."""

import sys

from hf_deformvos.cli import main


if __name__ == "__main__":
    sys.exit(main())
