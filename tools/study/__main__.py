"""The command line of the study.

    python -m tools.study run --folder runs/study [--arms L B] [--seeds 10 11]
    python -m tools.study collect --folder runs/study
    python -m tools.study probes --folder runs/study
    python -m tools.study report

`run` does what is missing, in the order of protocol.md. `collect` scores finished runs again. `probes` asks them
the test questions on other films. `report` writes the tables of docs/results/study.md from the result files.
"""

from __future__ import annotations

import argparse
import logging
from pathlib import Path

from tools.study.arms import BASE
from tools.study.report import write_page
from tools.study.results_file import read_results
from tools.study.runner import RESULTS, Study, all_arms, all_seeds, collect_again, probe


def main(words: list[str] | None = None) -> None:
    """Parse the command line and do what it says."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    run = commands.add_parser("run", help="do the missing runs")
    run.add_argument("--arms", nargs="+", choices=[BASE, *all_arms()], default=[BASE, *all_arms()])
    run.add_argument("--seeds", nargs="+", type=int, choices=sorted(all_seeds()), default=sorted(all_seeds()))
    collect = commands.add_parser("collect", help="score the finished runs again")
    probes = commands.add_parser("probes", help="ask the finished runs the test questions on other films")
    for parser_of_runs in (run, collect, probes):
        parser_of_runs.add_argument("--folder", type=Path, default=Path("runs/study"), help="films and runs")
    commands.add_parser("report", help="write the tables of the results page")
    options = parser.parse_args(words)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    if options.command == "run":
        Study(options.folder).run(options.arms, options.seeds)
    elif options.command in ("collect", "probes"):
        again = collect_again if options.command == "collect" else probe
        print("\n".join(again(Study(options.folder))))
    else:
        write_page(read_results(RESULTS))


if __name__ == "__main__":
    main()
