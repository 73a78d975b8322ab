"""`python -m medalign`: the `medalign` command."""

import sys

from medalign.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
