"""The steps of a canary: what an attacker knows of them, and the likelihood ratio that follows."""

from __future__ import annotations

from typing import Any

import numpy as np
import tensorflow as tf

from keras_bandmf.planning.plan import TrainingPlan
from keras_bandmf.planning.units import ROW
from keras_bandmf.sampling.patterns import PoissonInGroup


def check_auditable(plan: TrainingPlan) -> None:
    """Refuses a plan whose canaries would not be rows that it draws.

    Args:
        plan: What the user gave as the plan.

    Raises:
        TypeError: It is not a plan.
        ValueError: The plan protects other units than rows, or does not draw its batches.
    """
    if not isinstance(plan, TrainingPlan):
        raise TypeError(f"Expected `plan` to be a TrainingPlan. Received: plan={plan!r}")
    if plan.unit != ROW or (plan.declares_participations and plan.min_separation is not None):
        raise ValueError(
            "Expected `plan` to be one that draws its batches and protects single rows, because a "
            f"canary is one row. Received: unit={plan.unit!r}, min_separation="
            f"{plan.min_separation}. Audit a plan with the same noise for rows."
        )


def known_steps(
    plan: TrainingPlan, draws: Any, rows: np.ndarray
) -> tuple[np.ndarray, np.ndarray | None]:
    """Returns where the attacker looks: what the accounting gives away, and nothing else.

    Args:
        plan: The plan of the run.
        draws: The draws of the run.
        rows: (canaries,) int64, the rows of the canaries.

    Returns:
        (num_steps, canaries) bool: where a participation is possible; and the group of each canary,
        where groups are known and steps are not.
    """
    steps = np.arange(plan.num_steps)
    if plan.certificate is not None:
        return np.ones((plan.num_steps, len(rows)), bool), None
    if isinstance(plan.schedule.law.patterns(plan.schedule), PoissonInGroup):
        groups = draws.groups()[rows]
        return steps[:, None] % plan.num_bands == groups, groups
    return np.stack([np.isin(rows, draws.indices(t)) for t in steps]), None


def log_likelihood_ratios(
    plan: TrainingPlan, found: np.ndarray, groups: np.ndarray | None
) -> np.ndarray:
    """Returns the log of the likelihood ratio of each canary, in against out.

    Args:
        plan: The plan of the run.
        found: (num_steps, canaries), the log of that of a participation in each single step.
        groups: (canaries,), the group of each, or None where it is not known or all steps are.

    Returns:
        (canaries,) float64.
    """
    pattern = plan.schedule.law.patterns(plan.schedule)
    if pattern is None or (plan.certificate is None and groups is None):  # all steps are known
        return found.sum(axis=0)
    rounds = pattern.rounds
    padding = rounds.most * rounds.num_bands - len(found)
    table = np.pad(found, ((0, padding), (0, 0)))
    table = table.reshape(rounds.most, rounds.num_bands, found.shape[1])
    of_groups = pattern.log_ratio(tf.constant(table)).numpy()
    if groups is not None:
        return of_groups[groups, np.arange(len(groups))]
    of_groups = of_groups + np.log(pattern.weights())[:, None]
    return np.logaddexp.reduce(of_groups, axis=0)
