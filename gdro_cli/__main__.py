"""``python -m gdro_cli``: the same as ``gdro``; what a multi-process launcher starts."""

import sys

if not sys.flags.safe_path:
    sys.path.pop(0)  # python -m puts the working folder first, whose files are data, not code

from gdro_cli.cli.app import main

if __name__ == "__main__":
    main()
