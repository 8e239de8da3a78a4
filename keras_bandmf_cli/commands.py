"""What the commands of the command line do. Imports the library, which takes seconds."""

from __future__ import annotations

import argparse
import dataclasses
import json
import pathlib
import sys
from collections.abc import Callable
from typing import Any

from keras_bandmf.audit import audit_steps
from keras_bandmf.planning.band_choice import BandCandidate, BandChoice
from keras_bandmf.planning.calibration import compare_bands, resolved_amplification
from keras_bandmf.planning.plan import TrainingPlan
from keras_bandmf.planning.progress import ProgressBar
from keras_bandmf.planning.statement import Statement
from keras_bandmf.plots import plot_audit, plot_plan, require_matplotlib
from keras_bandmf_cli import verification
from keras_bandmf_cli.command_line import NotConfirmedError


def _run_of(arguments: argparse.Namespace) -> dict[str, Any]:
    """Returns what `compare_bands` and `TrainingPlan.calibrate` both take."""
    names = ("num_examples", "batch_size", "epochs", "num_steps", "epsilon", "delta")
    return {name: getattr(arguments, name) for name in (*names, "max_participations")}


def _choice(arguments: argparse.Namespace) -> BandChoice:
    if sys.stderr.isatty():
        sys.stderr.write("Comparing numbers of bands, which may take half a minute ...\n")
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
        raise NotConfirmedError(text)
    return text


def _plan(arguments: argparse.Namespace) -> str:
    """Makes the plan, writes the files that were asked for, and returns the report."""
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
        choice = _with_numbers_of(choice, plan)
    report = f"{plan}\n\nBands compared at this epsilon and delta{known}:\n{choice}"
    report += "".join(f"\n\nNote: {caveat}." for caveat in plan.statement().caveats)
    if arguments.json is not None:
        arguments.json.write_text(plan.to_json() + "\n", encoding="utf-8")
        report += f"\n\nPlan written to {arguments.json}"
    if arguments.plot is not None:
        plot_plan(plan, choice, str(arguments.plot))
        report += f"\n\nPicture written to {arguments.plot}"
    return report


def _with_numbers_of(choice: BandChoice, plan: TrainingPlan) -> BandChoice:
    """Returns the comparison with the numbers of the plan in its row, which are finer."""

    def row_of(row: BandCandidate) -> BandCandidate:
        if (row.num_bands, row.sampling) != (plan.num_bands, plan.sampling):
            return row
        return dataclasses.replace(
            row, noise_multiplier=plan.noise_multiplier, expected_rmse=plan.expected_rmse
        )

    return dataclasses.replace(choice, candidates=tuple(map(row_of, choice.candidates)))


def _show(arguments: argparse.Namespace) -> str:
    """Returns a plan or a statement as it prints."""
    return str(_read(arguments.file))


def _statement(arguments: argparse.Namespace) -> str:
    """Returns the statement of a plan, and writes it where that was asked for."""
    statement = _statement_in(arguments.file)
    if arguments.json is None:
        return str(statement)
    arguments.json.write_text(statement.to_json() + "\n", encoding="utf-8")
    return f"{statement}\n\nStatement written to {arguments.json}"


def _verify(arguments: argparse.Namespace) -> str:
    """Returns what was found when epsilon was computed again.

    Raises:
        NotConfirmedError: It is not that of the statement.
    """
    statement = _statement_in(arguments.file)
    confirmed, text = verification.verify(json.loads(statement.to_json()))
    if not confirmed:
        raise NotConfirmedError(text)
    return text


def _statement_in(file: pathlib.Path) -> Statement:
    """Returns the statement in a file, or that of the plan in it."""
    read = _read(file)
    return read.statement() if isinstance(read, TrainingPlan) else read


def _read(file: pathlib.Path) -> TrainingPlan | Statement:
    """Returns the plan or the statement in a file.

    Raises:
        ValueError: It has neither.
    """
    text = file.read_text(encoding="utf-8")
    try:
        kept = json.loads(text)
        kind = kept.get("format") if isinstance(kept, dict) else None
    except json.JSONDecodeError:
        kind = None
    if kind == "keras_bandmf.Statement":
        return Statement.from_json(text)
    if kind == "keras_bandmf.TrainingPlan":
        return TrainingPlan.from_json(text)
    raise ValueError(
        "Expected a plan or a statement as JSON, which `plan.to_json()` and `statement.to_json()` "
        f"write. Received: {str(file)!r}, which has format={kind!r}."
    )


#: By the name that the parser gives.
COMMANDS: dict[str, Callable[[argparse.Namespace], str]] = {
    "plan": _plan,
    "compare_bands": _compare_bands,
    "show": _show,
    "statement": _statement,
    "verify": _verify,
    "audit": _audit,
}
