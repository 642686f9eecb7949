"""``python -m gdro_cli``: the same as ``gdro``; what a multi-process launcher starts."""

from gdro_cli.cli.app import main

if __name__ == "__main__":
    main()
