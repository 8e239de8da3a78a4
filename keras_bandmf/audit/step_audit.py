"""`audit_steps`: attacks simulated runs of a plan, with nothing at work but the mechanism."""

from __future__ import annotations

import math
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from keras_bandmf._checks import checked_float, checked_int
from keras_bandmf.accounting.composition import event_parts
from keras_bandmf.accounting.trade_off import finite_noise, trade_off
from keras_bandmf.audit.bounds import Trials, contradicted, rates_of_trials
from keras_bandmf.audit.participations import (
    check_auditable,
    known_steps,
    log_likelihood_ratios,
)
from keras_bandmf.audit.released import filtered
from keras_bandmf.audit.report import AuditReport
from keras_bandmf.optimizers.bandmf import BandMFOptimizer
from keras_bandmf.planning.plan import TrainingPlan
from keras_bandmf.training.private_training import privatize

#: How much longer than the clip norm the gradient of a canary is.
_LENGTH = 1_000.0
#: Numbers that one run may release: steps times canaries.
_MOST_RELEASED = 20_000_000
_ATTACKS = (
    "likelihood ratio of the plan",
    "sum of the steps in which it may have taken part",
    "largest of these steps",
    "range of the releases",
)


def audit_steps(
    plan: TrainingPlan,
    *,
    trials: int = 4_000,
    confidence: float = 0.95,
    distribution: tf.distribute.Strategy | None = None,
    seed: int | None = None,
) -> AuditReport:
    """Attacks simulated runs of a plan, and returns a lower bound on the epsilon they have.

    A tiny model stands in for the user's: an embedding table with one number for each row of the
    data. A coin decides for each of many rows (the canaries) whether the gradient of its number is
    a thousand times the clip norm, or zero. No other row touches that number, so that its releases
    are the mechanism's worst case, and every canary is a trial of its own. Everything else is what
    the plan's user runs: `plan.batches`, a private `fit`, clipping, noise and their sum.

    The attacker sees the noisy sums of all steps, and of the sampling exactly what the accounting
    gives away. There are four attacks: the likelihood ratio of the mechanism that the plan
    describes, and three that find what it would overlook. The first half of the trials chooses
    attack and threshold, the second half counts. All pairs (epsilon, delta) that the accountant
    certifies for the plan are then compared with the rates found.

    Formal guarantees: if the runs are (epsilon, delta)-differentially private for all pairs that
        the plan claims, and the numbers of different parameters get independent noise, then the
        report contradicts the plan with probability at most `1 - confidence`. A report that does
        not contradict it proves the lower bound and no more: other models, layers, data or devices
        can have faults that this model has not.

    Args:
        plan: The plan. It must draw its batches itself and protect single rows.
        trials: How many canaries; half of them count. More than `plan.num_examples` take several
            runs.
        confidence: In (0, 1).
        distribution: A `tf.distribute` strategy to run under, or None.
        seed: Makes coins and runs repeatable, for tests.

    Returns:
        An `AuditReport`. Its scores are those of the trials that count.

    Raises:
        TypeError: If an argument is of the wrong type.
        ValueError: If an argument is out of range, or the plan cannot be audited.

    Example:
        >>> import keras_bandmf as bandmf
        >>> plan = bandmf.TrainingPlan(
        ...     num_examples=400, batch_size=40, epochs=2, noise_multiplier=1.0, delta=1e-5,
        ...     num_bands=2)
        >>> report = bandmf.audit.audit_steps(plan, trials=400)
        >>> report.consistent
        True
    """
    _check_plan(plan)
    trials = checked_int("trials", trials, minimum=100)
    checked_float("confidence", confidence, above=0.0, below=1.0)
    if not isinstance(distribution, (tf.distribute.Strategy, type(None))):
        raise TypeError(
            "Expected `distribution` to be a tf.distribute.Strategy or None. Received: "
            f"distribution={distribution!r}."
        )
    rng = np.random.default_rng(None if seed is None else checked_int("seed", seed, minimum=0))
    scores: list[np.ndarray] = []
    included = np.zeros(0, bool)
    while len(included) < trials:
        left = trials - len(included)
        count = min(left, plan.num_examples, max(1, _MOST_RELEASED // plan.num_steps))
        coins = rng.integers(0, 2, count).astype(bool)
        key = None if seed is None else int(rng.integers(2**31))
        scores.append(_scores_of_run(plan, coins, distribution, key))
        included = np.concatenate([included, coins])
    return _report(plan, np.concatenate(scores, axis=1), included, confidence)


def _check_plan(plan: TrainingPlan) -> None:
    check_auditable(plan)
    if plan.noise_multiplier == 0:
        raise ValueError(
            "Expected `plan` to have noise: without, epsilon is infinite and no bound contradicts "
            "it. Received: noise_multiplier=0.0"
        )


@keras.saving.register_keras_serializable(package="keras_bandmf")
class _Keep(keras.optimizers.Optimizer):
    """Puts the gradient that it is given in place of the weights: what a step released."""

    def __init__(self, name: str = "keep"):
        super().__init__(learning_rate=1.0, name=name)

    def update_step(self, gradient: Any, variable: Any, learning_rate: Any) -> None:
        """Overwrites the variable."""
        variable.assign(gradient)


class _Releases(keras.callbacks.Callback):
    """Copies the weights after every step, which are what that step released."""

    def __init__(self, steps: int, canaries: int):
        super().__init__()
        self.sums = np.zeros((steps, canaries), np.float32)
        self._step = 0

    def on_train_batch_end(self, batch: int, logs: dict | None = None) -> None:
        """Keeps what the step released of each canary's number."""
        (table,) = self.model.trainable_variables
        self.sums[self._step] = keras.ops.convert_to_numpy(table)[: self.sums.shape[1], 0]
        self._step += 1


def _product(y: tf.Tensor, y_pred: tf.Tensor) -> tf.Tensor:
    """A loss whose gradient by the output is the target."""
    return y * y_pred


def _scores_of_run(
    plan: TrainingPlan,
    coins: np.ndarray,
    distribution: tf.distribute.Strategy | None,
    seed: int | None,
) -> np.ndarray:
    """Runs the plan once, and returns the score of each canary by each attack."""
    canaries = len(coins)
    x = np.minimum(np.arange(plan.num_examples), canaries)[:, None]  # the rest share a number
    y = np.zeros((plan.num_examples, 1), np.float32)
    y[:canaries, 0] = _LENGTH * coins
    with distribution.scope() if distribution is not None else tf.device(None):
        table = keras.layers.Embedding(canaries + 1, 1, embeddings_initializer="zeros")
        model = keras.Sequential([keras.Input((1,), dtype="int64"), table, keras.layers.Flatten()])
        model = privatize(model)
        model.compile(BandMFOptimizer(_Keep(), plan, l2_norm_clip=1.0, seed=seed), loss=_product)
    releases = _Releases(plan.num_steps, canaries)
    model.fit(plan.batches(x, y), epochs=None, verbose=0, callbacks=[releases])
    sums = releases.sums.astype(np.float64) * plan.schedule.expected_batch_size
    draws = plan.schedule.draws(model.optimizer.run_state.sampler_key)
    possible, groups = known_steps(plan, draws, np.arange(canaries))

    variance = plan.noise_stddev(1.0) ** 2
    found = np.zeros_like(sums)
    sizes = np.zeros_like(sums)
    for step, (direction, energy) in enumerate(filtered(sums, plan)):
        found[step] = np.where(possible[step], (direction - 0.5 * energy) / variance, 0.0)
        sizes[step] = np.where(possible[step], direction / np.sqrt(energy * variance), 0.0)
    settled = sums[min(plan.num_bands, plan.num_steps) - 1 :]
    return np.stack(
        [
            log_likelihood_ratios(plan, found, groups),
            sizes.sum(axis=0),
            sizes.max(axis=0),
            np.ptp(settled, axis=0),
        ]
    )


def claims_of(plan: TrainingPlan) -> list[tuple[float, float]]:
    """Returns all pairs (epsilon, delta) that the statement of a plan rests on.

    Args:
        plan: The plan.

    Returns:
        The pair of the plan, and those by which its statement says what an attacker can do.
    """
    epsilon, delta = plan.epsilon(), plan.delta
    if not 0.0 < epsilon < math.inf:
        return [(epsilon, delta)]
    events = event_parts(plan.dp_event())
    # Not by `plan.statement()`, which imports TF Privacy and asks it, too.
    curve, _ = trade_off(events, epsilon, delta, finite_noise(delta, epsilon))
    return list(curve.pairs)


def _report(
    plan: TrainingPlan, scores: np.ndarray, included: np.ndarray, confidence: float
) -> AuditReport:
    scores = np.nan_to_num(scores, nan=0.0)
    first = np.arange(len(included)) < len(included) // 2
    sides = [half & side for half in (first, ~first) for side in (included, ~included)]
    trials = Trials(*(list(scores[:, side]) for side in sides))
    # One test for the bound and one for the claims, each with half of the error.
    share = 0.5 * (1.0 + confidence)
    shown, attack, threshold = rates_of_trials(trials, plan.delta, share)
    claims = claims_of(plan)
    rates, _, _ = rates_of_trials(trials, plan.delta, share, claims)
    inside, outside = trials.counted_in[attack], trials.counted_out[attack]
    right, wrong = (int(np.sum(s >= threshold)) for s in (inside, outside))
    return AuditReport(
        kind="step",
        attack=_ATTACKS[attack],
        epsilon_lower_bound=shown.epsilon,
        epsilon=plan.epsilon(),
        delta=plan.delta,
        confidence=confidence,
        scores_in=inside,
        scores_out=outside,
        details=(
            f"found {right} of {len(inside)} canaries that took part, and took {wrong} of "
            f"{len(outside)} others for such; as many trials chose the attack"
        ),
        contradicted=contradicted(rates, claims),
    )
