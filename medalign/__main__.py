"""The `medalign` command. Each subcommand is a function below; `train` reads its settings from a recipe."""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Sequence
from pathlib import Path

from medalign import __version__, distributed
from medalign.cli.values import count, share
from medalign.errors import ConfigError, MedAlignError, plain

log = logging.getLogger("medalign")

_EPILOG = """
a first run, from nothing to a report:
  medalign phantom --output data --train 2000 --val 200
  deepspeed --module medalign train phantom --data.train data/train --run.dir runs/first
  medalign evaluate runs/first --data data/val
  medalign report runs/first --output report.html
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command. Returns the exit status: 0, or 2 after an error that the user can mend."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    # The deepspeed launcher puts its own option in front; the rank comes from the environment.
    words = [word for word in words if not word.startswith("--local_rank")]
    distributed.set_up_logging()
    try:
        if words[:1] == ["train"] and not {"-h", "--help"} & set(words):
            return _train(words[1:])
        if words[:1] == ["inspect"]:
            from medalign import inspection

            return inspection.command(words[1:])
        if words[:1] == ["shards"]:
            from medalign.cli import shards

            return shards.run(words[1:])
        chosen = _parser().parse_args(words)
        return chosen.command(chosen)
    except MedAlignError as error:
        log.error("error: %s", error)
        return 2
    except OSError as error:  # a file that cannot be read or written, and that nothing above knew better
        log.error("error: %s", plain(error))
        return 2
    except KeyboardInterrupt:
        log.error("interrupted")
        return 130


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="medalign",
        description="Distil a medical CLIP's sight into a medical vision-language model, and measure what it gives.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"medalign {__version__}")
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")
    for add in (
        _add_phantom,
        _add_shards,
        _add_inspect,
        _add_train,
        _add_generate,
        _add_evaluate,
        _add_report,
        _add_export,
        _add_bench,
    ):
        add(commands)
    return parser


def _command(commands, name: str, run, summary: str, description: str) -> argparse.ArgumentParser:
    parser = commands.add_parser(
        name,
        help=summary,
        description=f"{summary[0].upper()}{summary[1:]}.\n\n{description}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.set_defaults(command=run)
    return parser


def _add_phantom(commands) -> None:
    parser = _command(
        commands,
        "phantom",
        _phantom,
        "write synthetic chest radiographs as shards",
        "Each study has up to three findings with known boxes, a report and questions. The same seed gives the same\n"
        "bytes; training and validation never share a study.\n\n"
        "example: medalign phantom --output data --train 2000 --val 200",
    )
    parser.add_argument(
        "--output", type=Path, required=True, metavar="DIR", help="folder to write train/ and val/ into"
    )
    parser.add_argument("--train", type=count, default=2000, metavar="N", help="training studies (default %(default)s)")
    parser.add_argument("--val", type=count, default=200, metavar="N", help="held-out studies (default %(default)s)")
    parser.add_argument("--seed", type=int, default=0, metavar="S", help="seed of the studies (default %(default)s)")
    parser.add_argument(
        "--reports",
        type=share,
        default=1.0,
        metavar="SHARE",
        help="share of the studies whose report is a sample too, beside their questions; a report has ten times "
        "the tokens of an answer and outweighs it in a mean over tokens (default %(default)s)",
    )


def _phantom(chosen: argparse.Namespace) -> int:
    from medalign import phantom

    reports = phantom.write(chosen.output, chosen.train, chosen.val, chosen.seed, chosen.reports)
    _say_packed(chosen.output, reports)
    return 0


def _add_shards(commands) -> None:
    # Its sources have options of their own: `cli.shards` reads them. Here it stands for the list of commands.
    commands.add_parser("shards", help="pack a data set into WebDataset shards; index tars of others", add_help=False)


def _say_packed(output: Path, reports) -> None:
    for split, report in reports.items():
        log.info("%s: %d samples in %d shards", output / split, report.written, report.shards)
        for reason in report.refused:
            log.warning("refused: %s", reason)


def _add_inspect(commands) -> None:
    # Settings of the recipe stand among its options: `inspection` reads them. Here it stands for the list of commands.
    commands.add_parser("inspect", help="show what a recipe will train on: keys of batches, or a batch", add_help=False)


def _add_train(commands) -> None:
    from medalign.config import describe_settings, recipes

    parser = _command(
        commands,
        "train",
        _no_recipe,
        "train a student from a recipe",
        f"RECIPE is a packaged one ({', '.join(recipes())}) or a path to a YAML file.\n"
        "Any setting below can be overridden. The same command again goes on from the last checkpoint.\n\n"
        "on all GPUs of a node:  deepspeed --module medalign train RECIPE ...\n"
        "under SLURM:            srun --kill-on-bad-exit=1 python -m medalign train RECIPE ...\n"
        "on one rank:            medalign train RECIPE ...\n\n" + describe_settings(),
    )
    parser.usage = "medalign train RECIPE [--section.key VALUE ...]"


def _no_recipe(_chosen: argparse.Namespace) -> int:
    return _train([])


def _train(words: Sequence[str]) -> int:
    from medalign.config import load, recipes

    if not words or words[0].startswith("-"):
        raise ConfigError(f"name a recipe first: medalign train RECIPE; packaged are {', '.join(recipes())}")
    config = load(words[0], words[1:])
    from medalign.run import train

    train(config)
    return 0


def _add_generate(commands) -> None:
    parser = _command(
        commands,
        "generate",
        _generate,
        "answer a question about an image, or several",
        "Prints the answer. With --overlay, draws the attention of the question's tokens at the tapped block to the\n"
        "first image.\n\n"
        'example: medalign generate runs/first --image film.png --question "Is there an effusion?" --overlay map.png',
    )
    _add_run(parser)
    _add_asking(parser)
    parser.add_argument(
        "--image",
        type=Path,
        required=True,
        action="append",
        metavar="FILE",
        help="PNG, JPEG, WebP, TIFF, BMP, GIF, JPEG 2000, PPM or DICOM; give it again for each further image, in order",
    )
    parser.add_argument("--question", required=True, metavar="TEXT", help="what to ask")
    parser.add_argument("--overlay", type=Path, metavar="FILE", help="picture to write, .png or .jpg")


def _generate(chosen: argparse.Namespace) -> int:
    from medalign.inference import generate

    given = generate(
        chosen.run,
        chosen.image,
        chosen.question,
        chosen.overlay,
        max_new_tokens=chosen.max_new_tokens,
        max_length=chosen.max_length,
        base=chosen.student,
    )
    sys.stdout.write(given.text + "\n")
    return 0


def _add_evaluate(commands) -> None:
    parser = _command(
        commands,
        "evaluate",
        _evaluate,
        "score a run on held-out shards",
        "Writes RUN/evaluation/NAME/predictions.jsonl and scores.json and prints the scores: closed accuracy, open\n"
        "recall, BLEU and ROUGE-L of reports, and for samples with boxes the share of the attention inside them (of\n"
        "the question's tokens, at the tapped block) and the pointing game. Counts answers that are empty or cut at\n"
        "--max-new-tokens. Of a checkpoint RUN/checkpoints/step-N, NAME begins with step-N.\n\n"
        "example: medalign evaluate runs/first --data data/val",
    )
    _add_run(parser)
    _add_asking(parser)
    parser.add_argument("--data", nargs="+", required=True, metavar="SHARDS", help="folders of shards")
    parser.add_argument("--name", metavar="NAME", help="default: the first folder's; an older one is replaced")
    parser.add_argument("--batch-size", type=count, default=32, metavar="N", help="default %(default)s")
    parser.add_argument("--limit", type=count, metavar="N", help="score the first N samples alone")
    parser.add_argument(
        "--max-skip-fraction",
        type=share,
        default=0.01,
        metavar="SHARE",
        help="stop when more of the samples cannot be read; fewer than 100 count as 100 (default %(default)s)",
    )


def _evaluate(chosen: argparse.Namespace) -> int:
    from medalign.evaluation.report.page import format_evaluation
    from medalign.inference import evaluate

    folder = evaluate(
        chosen.run,
        chosen.data,
        name=chosen.name,
        batch_size=chosen.batch_size,
        limit=chosen.limit,
        max_new_tokens=chosen.max_new_tokens,
        max_length=chosen.max_length,
        max_skip_fraction=chosen.max_skip_fraction,
        base=chosen.student,
    )
    sys.stdout.write(format_evaluation(folder) + "\n")
    others = len(list(folder.parent.glob("*/scores.json"))) - 1
    beside = f"; {others} more in {folder.parent}, medalign report shows all" if others else ""
    log.info("predictions and scores: %s%s", folder, beside)
    return 0


def _add_report(commands) -> None:
    parser = _command(
        commands,
        "report",
        _report,
        "write an HTML report that compares runs",
        "Score tables, loss curves and attention overlays in one file that loads nothing from elsewhere. It shows\n"
        "images and text of the evaluation data: keep it where those may be.\n\n"
        "example: medalign report runs/language runs/medalign --output report.html",
    )
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="folders of evaluated runs")
    parser.add_argument("--output", type=Path, required=True, metavar="HTML", help="file to write")
    parser.add_argument(
        "--examples", type=count, default=8, metavar="N", help="questions to picture (default %(default)s)"
    )


def _report(chosen: argparse.Namespace) -> int:
    from medalign.evaluation.report.page import format_table, write_report

    write_report(chosen.runs, chosen.output, examples=chosen.examples)
    sys.stdout.write(f"{format_table(chosen.runs)}\n\nreport: {chosen.output.resolve()}\n")
    return 0


def _add_export(commands) -> None:
    parser = _command(
        commands,
        "export",
        _export,
        "write the trained student as safetensors",
        "An adapter, W and their settings, which `medalign generate` loads; with --merge an ordinary model folder\n"
        "for transformers (only where W is off: it acts on image tokens alone).\n\n"
        "example: medalign export runs/first --output student",
    )
    _add_run(parser)
    parser.add_argument("--output", type=Path, required=True, metavar="DIR", help="new folder")
    parser.add_argument("--merge", action="store_true", help="fold the adapter into the base model's weights")


def _export(chosen: argparse.Namespace) -> int:
    from medalign.checkpoint import export

    source = export.find_export(chosen.run)
    if chosen.merge:
        export.merge(source, chosen.output, chosen.student)
    else:
        export.copy(source, chosen.output)
    log.info("%s", chosen.output)
    return 0


def _add_bench(commands) -> None:
    parser = _command(
        commands,
        "bench",
        _bench,
        "measure the fused commands, or compile them for GPUs that are not here",
        "Without --compile and --tune: correctness, time (median, 20th and 80th percentile) and peak memory of every\n"
        "path at several sizes, value and gradient together. On the CPU, TRITON_INTERPRET=1 includes the fused\n"
        "kernels, interpreted: right or wrong, and very slow.\n\n"
        "example: medalign bench kernels --device cuda --output commands.json",
    )
    parser.add_argument("what", choices=["kernels"], help="what to measure")
    parser.add_argument("--kernel", metavar="NAME", help="this operation alone (token_similarity, attention_map)")
    parser.add_argument(
        "--compile",
        action="store_true",
        help="compile every configuration that can be chosen; registers, spills, shared memory, operations, bytes",
    )
    cards = ["sm_80", "sm_90", "sm_100"]
    parser.add_argument("--architecture", nargs="+", default=cards, metavar="SM", help="with --compile")
    parser.add_argument("--tune", action="store_true", help="time all candidates and write the configurations' table")
    parser.add_argument(
        "--tables", type=Path, metavar="DIR", help="with --tune: write the tables here, not the package's"
    )
    parser.add_argument("--seconds", type=count, metavar="S", help="with --tune: longest time per entry of a table")
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"], help="where to run (default %(default)s)")
    parser.add_argument("--dtype", choices=["bf16", "fp16", "fp32"], help="default bf16 on cuda, fp32 on cpu")
    parser.add_argument("--tokens", nargs="+", type=count, metavar="N", help="sizes (default 576 to 16384 on cuda)")
    parser.add_argument("--repeats", type=count, default=20, metavar="N", help="timed runs (default %(default)s)")
    parser.add_argument("--skip", nargs="+", default=[], metavar="PATH", help="paths to leave out, e.g. torch.compile")
    parser.add_argument("--output", type=Path, metavar="JSON", help="file to write the figures to as well")


def _bench(chosen: argparse.Namespace) -> int:
    from medalign.benchmark.kernels import commands

    if chosen.compile:
        tables = commands.compilation(chosen.kernel, chosen.architecture)
    elif chosen.tune:
        tables = commands.tuning(chosen.kernel, chosen.device, chosen.repeats, chosen.tables, chosen.seconds)
    else:
        measured = chosen.dtype, chosen.tokens, max(2, chosen.repeats), chosen.skip
        tables = commands.measurement(chosen.kernel, chosen.device, *measured)
    sys.stdout.write(commands.format_tables(tables, chosen.output))
    commands.raise_on_failed_checks(tables)
    return 0


def _add_run(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", type=Path, metavar="RUN", help="folder of a run, a checkpoint or an export")
    parser.add_argument("--student", metavar="DIR", help="the base model's folder, if it has moved since training")


def _add_asking(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--max-length",
        type=count,
        metavar="N",
        help="longest question in tokens, its first image included; text beyond it is cut (default: as in training)",
    )
    parser.add_argument(
        "--max-new-tokens", type=count, default=128, metavar="N", help="longest answer (default %(default)s)"
    )


if __name__ == "__main__":
    sys.exit(main())
