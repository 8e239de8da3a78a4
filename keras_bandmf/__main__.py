"""The command line: `python -m keras_bandmf plan --num_examples=60000 ...`."""

from __future__ import annotations

import os
import sys
from typing import Any

from absl import app, flags

_USAGE = """\
Usage: python -m keras_bandmf plan --num_examples=N --batch_size=B --epochs=K --epsilon=E --delta=D

Finds the number of bands and the noise multiplier for a private run, and prints what to expect.
It looks at no data.
"""


def _define_flags() -> flags.FlagValues:
    # Flags of our own, not the global FLAGS: other libraries define "batch_size" there.
    values = flags.FlagValues()
    own: dict[str, Any] = {"flag_values": values}
    flags.DEFINE_integer("num_examples", None, "Rows of the training data, a public number.", **own)
    flags.DEFINE_integer("batch_size", None, "Expected examples a step.", **own)
    flags.DEFINE_integer("epochs", None, "Passes over the data; or --num_steps.", **own)
    flags.DEFINE_integer("num_steps", None, "Optimizer updates; or --epochs.", **own)
    flags.DEFINE_float("epsilon", None, "Target epsilon.", **own)
    flags.DEFINE_float("delta", None, "Target delta, below 1 / num_examples.", **own)
    flags.DEFINE_string("num_bands", "auto", "A number of bands, or 'auto'.", **own)
    flags.DEFINE_integer("max_bands", 128, "Most bands 'auto' may take.", **own)
    flags.DEFINE_enum(
        "sampling",
        "cyclic_poisson",
        ["cyclic_poisson", "fixed_order", "auto"],
        "How batches are drawn; 'auto' takes the one of lower expected RMSE, which decides what "
        "neighbouring data sets are (see the adjacency of the plan).",
        **own,
    )
    flags.DEFINE_string("plot", None, "Draw the plan to this file (.png, .pdf, .svg).", **own)
    flags.DEFINE_string("json", None, "Write the plan to this file.", **own)
    flags.DEFINE_bool("help", False, "Show this help.", short_name="h", **own)
    return values


def main(argv: list[str] | None = None) -> int:
    """Runs a command.

    Args:
        argv: the program's name, the command and its flags; those of the process if None, as for
            the console script `keras-bandmf`.

    Returns:
        The exit code: 0, or 2 for a mistake in the arguments, which is told without a traceback.
    """
    argv = sys.argv if argv is None else argv
    values = _define_flags()
    try:
        words = values(argv)[1:]
        if values.help:
            sys.stdout.write(_USAGE + "\n" + values.get_help() + "\n")
            return 0
        if words != ["plan"]:
            raise ValueError(f"Expected the command `plan`. Received: {' '.join(words) or 'none'}.")
        sys.stdout.write(_plan(values) + "\n")
    except (flags.Error, ValueError, TypeError, ImportError, OSError) as error:
        sys.stderr.write(f"error: {error}\n\n{_USAGE}Try --help for the flags.\n")
        return 2
    return 0


def _plan(values: flags.FlagValues) -> str:
    """Makes the plan, writes what was asked for, and returns the report."""
    for name in ("num_examples", "batch_size", "epsilon", "delta"):
        if values[name].value is None:
            raise ValueError(f"Expected --{name}. Received: none.")
    num_bands = _bands(values.num_bands)
    for name in ("plot", "json"):
        _check_writable(name, values[name].value)
    # TensorFlow takes seconds to import: not before the flags are known to be good.
    from keras_bandmf.planning.calibration import compare_bands
    from keras_bandmf.planning.plan import TrainingPlan

    arguments: dict[str, Any] = {
        "num_examples": values.num_examples,
        "batch_size": values.batch_size,
        "epochs": values.epochs,
        "num_steps": values.num_steps,
        "epsilon": values.epsilon,
        "delta": values.delta,
    }
    choice = compare_bands(
        **arguments, num_bands=num_bands, sampling=values.sampling, max_bands=values.max_bands
    )
    best = (choice if num_bands == "auto" else choice.of_bands(num_bands)).best
    plan = TrainingPlan.calibrate(**arguments, strategy=best.strategy, sampling=best.sampling)
    report = f"{plan}\n\nBands compared at this epsilon and delta:\n{choice}"
    if values.json is not None:
        with open(values.json, "w", encoding="utf-8") as file:
            file.write(plan.to_json() + "\n")
        report += f"\n\nPlan written to {values.json}"
    if values.plot is not None:
        from keras_bandmf.plots import plot_plan

        plot_plan(plan, choice, values.plot)
        report += f"\n\nPicture written to {values.plot}"
    return report


def _bands(text: str) -> int | str:
    if text == "auto":
        return text
    try:
        return int(text)
    except ValueError:
        message = f"Expected --num_bands to be a number or auto. Received: --num_bands={text}."
        raise ValueError(message) from None


def _check_writable(name: str, path: str | None) -> None:
    """Better now than after the planning."""
    if path is not None and not os.path.isdir(os.path.dirname(path) or "."):
        raise ValueError(f"Expected --{name} to be in a folder that exists. Received: {path}.")


def _arguments(argv: list[str]) -> list[str]:
    """Leaves parsing to `main`, where mistakes are told without absl's help pages."""
    flags.FLAGS(argv[:1])  # absl insists that its global flags are parsed
    return argv


if __name__ == "__main__":
    app.run(main, flags_parser=_arguments)
