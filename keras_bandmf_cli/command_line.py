"""The command line: `keras-bandmf COMMAND ...`, or `python -m keras_bandmf COMMAND ...`.

This module imports neither TensorFlow nor the library, so that help and mistakes in the arguments
are answered at once. What the commands do is in `commands.py`.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import pathlib
import sys
import tempfile
from collections.abc import Iterator, Sequence
from typing import NoReturn

#: What `main` returns: done, a run that is refused, and a mistake in the arguments.
DONE, REFUSED, USAGE = 0, 1, 2


class _UsageError(Exception):
    """A mistake in the arguments that argparse cannot see."""


class NotConfirmedError(Exception):
    """The report of an audit or a verification that contradicts what it was given."""


class _Parser(argparse.ArgumentParser):
    """A parser that reports a mistake in one line before the usage, instead of after it."""

    def error(self, message: str) -> NoReturn:
        self.exit(USAGE, f"error: {message}\n{self.format_usage()}")


def _parser() -> _Parser:
    parser = _Parser(
        prog="keras-bandmf",
        description="Plans private training runs, shows, verifies and audits plans. It looks at no "
        "data.",
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
    plan.set_defaults(run="plan")
    compare = commands.add_parser(
        "compare-bands",
        aliases=["compare"],
        help="show the expected error for each number of bands",
        description="Prints a table of the expected error for each number of bands at one "
        "(epsilon, delta). The best one is starred.",
        allow_abbrev=False,
    )
    _add_run(compare)
    compare.set_defaults(run="compare_bands")
    for name, help_text in (
        ("show", "print a plan or a statement that was kept as JSON"),
        ("statement", "print what a plan would guarantee, line by line"),
        ("verify", "compute the epsilon of a plan or a statement again, with dp_accounting alone"),
    ):
        reader = commands.add_parser(
            name, help=help_text, description=f"{help_text.capitalize()}.", allow_abbrev=False
        )
        kind = "a plan as JSON" if name == "statement" else "a plan or a statement as JSON"
        reader.add_argument("file", type=pathlib.Path, metavar="FILE", help=kind)
        reader.set_defaults(run=name)
    reader = commands.choices["statement"]
    reader.add_argument("--json", type=pathlib.Path, metavar="FILE", help="write it as JSON, too")
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
    audit.set_defaults(run="audit")
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
        be read or written, or an epsilon is not confirmed, or an audit contradicts its plan; 2 for
        a mistake in the arguments. Errors are printed in one line, without a traceback.
    """
    try:
        arguments = _parser().parse_args(argv)
        _check_folders(arguments)
    except SystemExit as stop:  # argparse has printed the help or the error
        return int(stop.code or DONE)
    except _UsageError as error:
        sys.stderr.write(f"error: {error}\n")
        return USAGE
    try:
        with _quiet_start():
            from keras_bandmf_cli import commands
        report = commands.COMMANDS[arguments.run](arguments)
    except NotConfirmedError as report_of_command:
        sys.stdout.write(f"{report_of_command}\n")
        return REFUSED
    except (ValueError, TypeError, ImportError, OSError) as error:
        sys.stderr.write(f"error: {' '.join(str(error).split())}\n")
        return REFUSED
    sys.stdout.write(f"{report}\n")
    return DONE


def _check_folders(arguments: argparse.Namespace) -> None:
    """Refuses files in folders that do not exist: better now than after the planning."""
    for name in ("plot", "json"):
        path = getattr(arguments, name, None)
        if path is not None and not path.parent.is_dir():
            message = f"argument --{name}: expected a file in a folder that exists, received: "
            raise _UsageError(f"{message}{str(path)!r}")
    output = getattr(arguments, "output", None)
    if output is not None and not output.is_dir():
        raise _UsageError(
            f"argument --output: expected a folder that exists, received: {str(output)!r}"
        )


@contextlib.contextmanager
def _quiet_start() -> Iterator[None]:
    """Keeps what TensorFlow writes to the standard error while it is loaded, unless that fails.

    Its first lines come before it reads any setting.
    """
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    sys.stderr.flush()
    with tempfile.TemporaryFile() as kept:
        shown = os.dup(2)
        os.dup2(kept.fileno(), 2)
        try:
            yield
        except BaseException:
            kept.seek(0)
            os.write(shown, kept.read())
            raise
        finally:
            os.dup2(shown, 2)
            os.close(shown)
