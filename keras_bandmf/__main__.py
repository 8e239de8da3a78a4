"""The command line: `keras-bandmf plan ...`, or `python -m keras_bandmf plan ...`."""

from __future__ import annotations

import argparse
import pathlib
import sys
from collections.abc import Sequence
from typing import Any, NoReturn

from keras_bandmf.audit import audit_steps
from keras_bandmf.planning.band_choice import BandChoice
from keras_bandmf.planning.calibration import compare_bands, resolved_amplification
from keras_bandmf.planning.plan import TrainingPlan
from keras_bandmf.planning.progress import ProgressBar
from keras_bandmf.plots import plot_audit, plot_plan, require_matplotlib

#: What `main` returns: done, a run that is refused, and a mistake in the arguments.
DONE, REFUSED, USAGE = 0, 1, 2


class _UsageError(Exception):
    """A mistake in the arguments that argparse cannot see."""


class _ContradictedError(Exception):
    """The report of an audit that contradicts its plan."""


class _Parser(argparse.ArgumentParser):
    """A parser that reports a mistake in one line before the usage, instead of after it."""

    def error(self, message: str) -> NoReturn:
        self.exit(USAGE, f"error: {message}\n{self.format_usage()}")


def _parser() -> _Parser:
    parser = _Parser(
        prog="keras-bandmf",
        description="Plans private training runs, and audits plans. It looks at no data.",
        epilog="`keras-bandmf COMMAND --help` shows the arguments of a command.",
        allow_abbrev=False,
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    plan = commands.add_parser(
        "plan",
        help="find the plan with the lowest expected error for an (epsilon, delta)",
        description="Finds the number of bands and the noise multiplier of a private run, and "
        "prints what to expect of it.",
        allow_abbrev=False,
    )
    _add_run(plan)
    plan.add_argument(
        "--plot", type=pathlib.Path, metavar="FILE", help="draw the plan (.png, .pdf or .svg)"
    )
    plan.add_argument("--json", type=pathlib.Path, metavar="FILE", help="write the plan as JSON")
    plan.add_argument(
        "--amplification",
        default="auto",
        choices=["auto", "known_group", "secret_group"],
        help="whether the accounting counts the random group of each example as secret, which "
        "needs less noise and takes a minute; 'auto' does so under random allocation, which rests "
        "on it (default: %(default)s)",
    )
    plan.add_argument(
        "--cache_dir",
        type=pathlib.Path,
        metavar="FOLDER",
        help="with secret groups, keep the result there, and take it from there the next time",
    )
    plan.add_argument(
        "--unit",
        default="example",
        metavar="WORD",
        help="what is counted and protected: 'example' is a row of the data (the default), "
        "'user' or another word a unit with several rows",
    )
    plan.set_defaults(run=_plan)
    compare = commands.add_parser(
        "compare-bands",
        help="show the expected error for each number of bands",
        description="Prints a table of the expected error for each number of bands at one "
        "(epsilon, delta). The best one is starred.",
        allow_abbrev=False,
    )
    _add_run(compare)
    compare.set_defaults(run=_compare_bands)
    audit = commands.add_parser(
        "audit",
        help="attack the noise and the clipping of a plan, and bound its epsilon from below",
        description="Runs the clipping, the sampling and the noise of a plan with canaries, and "
        "prints how much of an attack on them succeeds. A lower bound above the plan's epsilon "
        "ends with the exit code 1.",
        allow_abbrev=False,
    )
    audit.add_argument(
        "--plan",
        type=pathlib.Path,
        required=True,
        metavar="FILE",
        help="a plan as JSON, which `keras-bandmf plan --json FILE` writes",
    )
    audit.add_argument(
        "--trials", type=int, default=4_000, metavar="T", help="canaries (default: %(default)s)"
    )
    audit.add_argument(
        "--confidence",
        type=float,
        default=0.95,
        metavar="C",
        help="how surely the bound holds (default: %(default)s)",
    )
    audit.add_argument(
        "--output",
        type=pathlib.Path,
        metavar="FOLDER",
        help="write audit.json, audit.txt and audit.png there",
    )
    audit.set_defaults(run=_audit)
    return parser


def _add_run(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments that describe a run."""
    run = parser.add_argument_group("the run")
    run.add_argument(
        "--num_examples", type=int, required=True, metavar="N", help="rows of data, a public number"
    )
    run.add_argument(
        "--batch_size", type=int, required=True, metavar="B", help="expected examples in a step"
    )
    length = run.add_mutually_exclusive_group(required=True)
    length.add_argument("--epochs", type=int, help="passes over the data")
    length.add_argument("--num_steps", type=int, metavar="STEPS", help="updates of the optimizer")
    run.add_argument(
        "--max_participations",
        type=int,
        metavar="K",
        help="for --sampling=random_allocation: the steps that every row takes part in (default: "
        "the epochs)",
    )
    run.add_argument("--epsilon", type=float, required=True, help="target epsilon")
    run.add_argument(
        "--delta", type=float, required=True, help="target delta; choose it below 1 / num_examples"
    )
    run.add_argument(
        "--num_bands",
        type=_bands,
        default="auto",
        metavar="BANDS",
        help="a number of bands, or 'auto' (the default)",
    )
    run.add_argument(
        "--max_bands",
        type=int,
        default=128,
        metavar="BANDS",
        help="the largest number of bands that 'auto' considers (default: %(default)s)",
    )
    run.add_argument(
        "--sampling",
        default="cyclic_poisson",
        choices=["cyclic_poisson", "random_allocation", "fixed_order", "auto"],
        help="how batches are drawn (default: %(default)s). 'auto' takes the one of lowest "
        "expected error, random_allocation only with --amplification secret_group; this also "
        "decides which data sets are neighbors (see the adjacency of the plan)",
    )


def _bands(text: str) -> int | str:
    if text == "auto":
        return text
    try:
        return int(text)
    except ValueError:
        message = f"expected a number of bands or 'auto', received: {text!r}"
        raise argparse.ArgumentTypeError(message) from None


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command.

    Args:
        argv: The command and its arguments, without the name of the program. None, as for the
            console script `keras-bandmf`, takes those of the process.

    Returns:
        The exit code: 0 if the command ran; 1 if the run it describes is refused, or a file cannot
        be written, or an audit contradicts its plan; 2 for a mistake in the arguments. Errors are
        printed in one line, without a traceback.
    """
    try:
        arguments = _parser().parse_args(argv)
    except SystemExit as stop:  # argparse has printed the help or the error
        return int(stop.code or DONE)
    try:
        report = arguments.run(arguments)
    except _UsageError as error:
        sys.stderr.write(f"error: {error}\n")
        return USAGE
    except _ContradictedError as report_of_audit:
        sys.stdout.write(f"{report_of_audit}\n")
        return REFUSED
    except (ValueError, TypeError, ImportError, OSError) as error:
        sys.stderr.write(f"error: {' '.join(str(error).split())}\n")
        return REFUSED
    sys.stdout.write(f"{report}\n")
    return DONE


def _run_of(arguments: argparse.Namespace) -> dict[str, Any]:
    """Returns what `compare_bands` and `TrainingPlan.calibrate` both take."""
    names = ("num_examples", "batch_size", "epochs", "num_steps", "epsilon", "delta")
    return {name: getattr(arguments, name) for name in (*names, "max_participations")}


def _choice(arguments: argparse.Namespace) -> BandChoice:
    return compare_bands(
        **_run_of(arguments),
        num_bands=arguments.num_bands,
        sampling=arguments.sampling,
        max_bands=arguments.max_bands,
    )


def _compare_bands(arguments: argparse.Namespace) -> str:
    """Returns the table of the candidates."""
    return str(_choice(arguments))


def _audit(arguments: argparse.Namespace) -> str:
    """Attacks the plan, writes the files that were asked for, and returns the report."""
    output = arguments.output
    if output is not None and not output.is_dir():
        raise _UsageError(
            f"argument --output: expected a folder that exists, received: {str(output)!r}"
        )
    if output is not None:
        require_matplotlib()
    plan = TrainingPlan.from_json(arguments.plan.read_text(encoding="utf-8"))
    report = audit_steps(plan, trials=arguments.trials, confidence=arguments.confidence)
    text = str(report)
    if output is not None:
        (output / "audit.txt").write_text(text + "\n", encoding="utf-8")
        (output / "audit.json").write_text(report.to_json() + "\n", encoding="utf-8")
        plot_audit(report, plan, output / "audit.png")
        text += f"\n\nReport and picture written to {output}"
    if not report.consistent:
        raise _ContradictedError(text)
    return text


def _plan(arguments: argparse.Namespace) -> str:
    """Makes the plan, writes the files that were asked for, and returns the report."""
    for name, path in (("plot", arguments.plot), ("json", arguments.json)):
        # Better now than after the planning.
        if path is not None and not path.parent.is_dir():
            message = f"argument --{name}: expected a file in a folder that exists, received: "
            raise _UsageError(f"{message}{str(path)!r}")
    choice, num_bands, known = _choice(arguments), arguments.num_bands, ""
    amplification = resolved_amplification(arguments.amplification, arguments.sampling)
    if amplification == "secret_group":
        # Bands and coefficients are chosen anew, by that accounting.
        plan = TrainingPlan.calibrate(
            **_run_of(arguments),
            num_bands=num_bands,
            max_bands=arguments.max_bands,
            sampling=arguments.sampling,
            amplification=amplification,
            # A bar would be in the way of whoever reads the report by a program.
            callback=ProgressBar(verbose=int(sys.stdout.isatty())),
            cache_dir=arguments.cache_dir,
            unit=arguments.unit,
        )
        known = ", if the random group of a row (and its steps under random allocation) was known"
    else:
        best = (choice.of_bands(num_bands) if isinstance(num_bands, int) else choice).best
        plan = TrainingPlan.calibrate(
            **_run_of(arguments),
            strategy=best.strategy,
            sampling=best.sampling,
            amplification=amplification,
            unit=arguments.unit,
        )
    report = f"{plan}\n\nBands compared at this epsilon and delta{known}:\n{choice}"
    if arguments.json is not None:
        arguments.json.write_text(plan.to_json() + "\n", encoding="utf-8")
        report += f"\n\nPlan written to {arguments.json}"
    if arguments.plot is not None:
        plot_plan(plan, choice, str(arguments.plot))
        report += f"\n\nPicture written to {arguments.plot}"
    return report


if __name__ == "__main__":
    sys.exit(main())
