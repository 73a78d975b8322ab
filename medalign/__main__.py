"""`python -m medalign`: the `medalign` command."""

from medalign.cli.main import main as main
from medalign.cli.main import run

if __name__ == "__main__":
    run()
