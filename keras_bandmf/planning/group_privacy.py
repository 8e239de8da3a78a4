"""The other way to protect users: sample rows, and account for all rows of a user at once."""

from __future__ import annotations

import math

import dp_accounting
import numpy as np
from scipy import stats

from keras_bandmf._checks import checked_int
from keras_bandmf.accounting.accountant import delta_without_noise_share
from keras_bandmf.planning.plan import TrainingPlan

# The accountant rounds privacy losses up to a grid; a finer one takes longer and gives less.
_GRID = 1e-3


def group_epsilon(plan: TrainingPlan, group_size: int) -> float:
    """Returns epsilon for all rows of a user at once, where a plan samples rows one by one.

    It is the baseline of training on users (`TrainingPlan(unit="user")`): rows are sampled and
    clipped one by one, and a user who brings at most `group_size` of them may take part several
    times in a step. A step is then a Gaussian whose shift is 0, 1, ..., `group_size` clip norms
    with binomial probabilities (Charles et al., "Fine-Tuning Large Language Models with User-Level
    Differential Privacy", arXiv 2407.07737).

    Formal guarantees: with at most `group_size` rows of each user in the data, which the caller
    sees to, adding or removing a user is (epsilon, `plan.delta`)-private. The number is that of
    `dp_accounting.pld.PLDAccountant` for a composition of `MixtureOfGaussiansDpEvent`, which rounds
    privacy losses up to a grid.

    Args:
        plan: A plan of rows with Poisson sampling and one band (DP-SGD). Of more bands nothing is
            known: the rows of a user would be in several groups, whose noise is correlated.
        group_size: The largest number of rows of a user in the training data.

    Returns:
        Epsilon; `math.inf` without noise.

    Raises:
        TypeError: `plan` is not a plan, or `group_size` is not an integer.
        ValueError: The plan is of another kind, or `group_size` is below 1 or above `num_examples`.

    Example:
        >>> import keras_bandmf as bandmf
        >>> plan = bandmf.TrainingPlan(
        ...     num_examples=10_000, batch_size=100, num_steps=20, num_bands=1,
        ...     noise_multiplier=4.0, delta=1e-5,
        ... )
        >>> plan.epsilon() < bandmf.group_epsilon(plan, group_size=4)
        True
    """
    if not isinstance(plan, TrainingPlan):
        raise TypeError(f"Expected `plan` to be a TrainingPlan. Received: plan={plan!r}.")
    size = checked_int("group_size", group_size, hint="It is the most rows of one user.")
    if plan.sampling != "cyclic_poisson" or plan.num_bands != 1 or plan.unit != "example":
        raise ValueError(
            "Expected `plan` to sample rows by Poisson sampling with one band. Received: "
            f"sampling={plan.sampling!r}, num_bands={plan.num_bands}, unit={plan.unit!r}. Use "
            "`TrainingPlan(unit='user')`, which protects users under every sampling law and "
            "with any number of bands."
        )
    if size > plan.num_examples:
        raise ValueError(
            f"Expected `group_size` to be at most num_examples={plan.num_examples}. Received: "
            f"group_size={size}."
        )
    if plan.noise_multiplier == 0:
        return math.inf
    counts = np.arange(size + 1)
    probabilities = stats.binom.pmf(counts, size, plan.batch_size / plan.num_examples)
    step = dp_accounting.dp_event.MixtureOfGaussiansDpEvent(
        plan.noise_multiplier, counts.tolist(), (probabilities / probabilities.sum()).tolist()
    )
    accountant = dp_accounting.pld.PLDAccountant(
        dp_accounting.NeighboringRelation.ADD_OR_REMOVE_ONE, value_discretization_interval=_GRID
    )
    accountant.compose(step, plan.num_steps)
    return float(accountant.get_epsilon(delta_without_noise_share(plan.delta)))
