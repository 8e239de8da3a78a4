"""A plan as a table."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from keras_bandmf._printed import rounded_down, rounded_up
from keras_bandmf.planning.arguments import strategy_in_words
from keras_bandmf.planning.units import ROW, sampling_in_words
from keras_bandmf.strategies import BandedInverseStrategy, Workload

if TYPE_CHECKING:
    from keras_bandmf.planning.plan import TrainingPlan


def plan_table(plan: TrainingPlan) -> str:
    """Returns what `print(plan)` shows: one line for each fact."""
    rows = plan_facts(plan)
    return "\n".join(["TrainingPlan", *(f"  {name:<18}{text}" for name, text in rows)])


def plan_facts(plan: TrainingPlan) -> list[tuple[str, str]]:
    """Returns the names and texts of what a plan says of itself."""
    epochs = plan.num_steps / plan.steps_per_epoch
    return [
        ("examples" if plan.unit == ROW else f"units ({plan.unit})", f"{plan.num_examples}"),
        ("batch size", f"{plan.batch_size}"),
        ("steps", f"{plan.num_steps} ({rounded_up(epochs, 4)} epochs of {plan.steps_per_epoch})"),
        ("sampling", sampling_in_words(plan.schedule, plan.unit)),
        ("strategy", _strategy_row(plan)),
        ("workload", workload_in_words(plan.workload)),
        ("noise multiplier", rounded_down(plan.noise_multiplier, 6)),
        ("sensitivity", rounded_up(plan.sensitivity, 6)),
        ("epsilon", rounded_up(plan.epsilon(), 6)),
        ("delta", rounded_up(plan.delta, 6)),
        ("adjacency", f"{plan.adjacency}, one {'row' if plan.unit == ROW else plan.unit}"),
        ("expected RMSE", f"{rounded_up(plan.expected_rmse, 6)} {rmse_unit(plan.workload)}"),
        ("fingerprint", plan.fingerprint[:16]),
    ]


def workload_in_words(workload: Workload | None) -> str:
    """Returns what the strategy was optimized for, in one line."""
    if workload is None:
        return "prefix sums"
    low, high = np.min(workload.learning_rates), np.max(workload.learning_rates)
    parts = [f"learning rate {low:g}" if low == high else f"learning rates {low:g} to {high:g}"]
    if workload.momentum:
        kind = "Nesterov momentum" if workload.nesterov else "momentum"
        parts.append(f"{kind} {workload.momentum:g}")
    if workload.weight_decay:
        parts.append(f"weight decay {workload.weight_decay:g}")
    if workload.is_curved:
        flattest, steepest = min(workload.curvatures), max(workload.curvatures)
        if flattest == steepest:
            parts.append(f"curvature {steepest:g}")
        else:
            count = len(workload.curvatures)
            parts.append(f"{count} curvatures from {flattest:g} to {steepest:g}")
    return "SGD, " + ", ".join(parts)


def rmse_unit(workload: Workload | None) -> str:
    """Returns the unit of `expected_rmse`: learning rates scale the noise in the weights."""
    return "clip norms" if workload is None else "clip norms x learning rate"


def _strategy_row(plan: TrainingPlan) -> str:
    if isinstance(plan.strategy, BandedInverseStrategy):
        return strategy_in_words(plan.strategy)
    return f"{type(plan.strategy).__name__}, bands: {plan.num_bands}"
