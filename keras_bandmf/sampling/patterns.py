"""Laws of who takes part when, as the accounting of a secret group sees them.

An example draws one of `b` groups, group j with probability `weight_j`, and takes part in steps
`j, j + b, j + 2 b, ...` only. What a law says is which of these. With `u_i` the likelihood ratio of
one participation in step i, `L_j = E prod u_i` over the patterns of group j, and the likelihood
ratio of the mechanism is `L = sum_j weight_j L_j`.
"""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import tensorflow as tf


@dataclasses.dataclass(frozen=True)
class Rounds:
    """The steps of `n` as a table of groups: step `j + b m` is round m of group j.

    Attributes:
        num_steps: n.
        num_bands: b, the number of groups.
    """

    num_steps: int
    num_bands: int

    @property
    def most(self) -> int:
        """The rounds of the first group, which has the most."""
        return -(-self.num_steps // self.num_bands)

    def of_group(self) -> np.ndarray:
        """The rounds of each group, shape (b,), int64; some groups have one fewer than others."""
        return (self.num_steps - 1 - np.arange(self.num_bands)) // self.num_bands + 1

    def exist(self) -> np.ndarray:
        """Which entries of the table are steps, shape (rounds, b, 1), bool."""
        return (np.arange(self.most)[:, None] < self.of_group())[:, :, None]


@dataclasses.dataclass(frozen=True)
class PoissonInGroup:
    """Each round of the example's group is a participation with one probability, independently.

    All groups are equally likely. `L_j = prod_i (1 - q + q u_i)`.

    Attributes:
        rounds: the steps.
        probability: q, in (0, 1].
    """

    rounds: Rounds
    probability: float

    def weights(self) -> np.ndarray:
        """The probability of each group, shape (b,)."""
        return np.full(self.rounds.num_bands, 1.0 / self.rounds.num_bands)

    def log_ratio(self, log_u: tf.Tensor) -> tf.Tensor:
        """`log L_j` of each group, shape (b, samples), from `log u_i`, (rounds, b, samples)."""
        if self.probability == 1.0:
            return tf.reduce_sum(tf.where(self.rounds.exist(), log_u, 0.0), axis=0)
        return log_mixed_product(log_u, self.probability, self.rounds)

    @property
    def log_odds(self) -> float:
        """log(q / (1 - q)); infinite for q = 1."""
        q = self.probability
        return math.log(q) - math.log1p(-q) if q < 1.0 else math.inf


@dataclasses.dataclass(frozen=True)
class AllocationInGroup:
    """Exactly k rounds of the example's group are participations, any k with equal probability.

    A group is drawn with a probability proportional to its number of rounds, so that every step
    is a participation with probability k / n. `L_j` is the mean of `prod u_i` over the k-subsets
    of the group's rounds.

    Attributes:
        rounds: the steps.
        participations: k, at most the rounds of the smallest group.
    """

    rounds: Rounds
    participations: int

    def __post_init__(self) -> None:
        least = int(self.rounds.of_group().min())
        if self.participations > least:
            raise ValueError(
                "Expected every group to have at least as many rounds as an example has "
                f"participations. Received: {self.participations} participations, "
                f"{self.rounds.num_steps} steps and {self.rounds.num_bands} bands, hence groups of "
                f"{least} rounds. Use at most {self.rounds.num_steps // self.participations} "
                "bands, or more steps."
            )

    def weights(self) -> np.ndarray:
        """The probability of each group, shape (b,)."""
        return self.rounds.of_group() / self.rounds.num_steps

    def log_ratio(self, log_u: tf.Tensor) -> tf.Tensor:
        """`log L_j` of each group, shape (b, samples), from `log u_i`, (rounds, b, samples).

        With `E_m` the mean of `prod u_i` over the m-subsets of the first i rounds,
        `E_m <- (1 - m / i) E_m + (m / i) u_i E_{m-1}`: sums of positive terms. All `u_i` of a
        group are divided by the root of the largest, and the result multiplied by its k-th power.
        Where float64 cannot hold what is between, the result is NaN or infinite.
        """
        k = self.participations
        exist = tf.constant(self.rounds.exist())
        log_u = tf.where(exist, log_u, 0.0)
        unit = tf.reduce_max(log_u, axis=0) / 2.0
        u = tf.exp(log_u - unit)
        orders = np.arange(1, k + 1, dtype=np.float64)[:, None, None]

        def after(index: tf.Tensor, means: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
            # Of i rounds there are no subsets of more: their mean stays 0 until there are.
            share = orders / tf.cast(index + 1, tf.float64)
            share = tf.where(share <= 1.0, share, 0.0)
            share = tf.where(exist[index], share, 0.0)
            smaller = tf.concat([tf.ones_like(means[:1]), means[:-1]], axis=0)
            return index + 1, (1.0 - share) * means + share * u[index] * smaller

        shape = tf.concat([[k], tf.shape(unit)], axis=0)
        _, means = tf.while_loop(
            lambda index, _: index < self.rounds.most,
            after,
            (tf.constant(0), tf.zeros(shape, tf.float64)),
            maximum_iterations=self.rounds.most,
        )
        # What has lost digits to the small end of the range is no number.
        mean = tf.where(means[-1] > 1e-290, means[-1], np.nan)
        return tf.math.log(mean) + k * unit


def log_mixed_product(
    log_u: tf.Tensor, probability: float | tf.Tensor, rounds: Rounds
) -> tf.Tensor:
    """The sum over the rounds of `log(1 - q + q u)`, shape (b, samples), without overflow.

    With z the log of `q u / (1 - q)`, a term is `log(1 - q) + max(z, 0) + log(1 + e^-|z|)`. The
    product of the last factors, which are between 1 and 2, needs a single logarithm.

    Args:
        log_u: shape (rounds, b, samples).
        probability: q, below 1.
        rounds: the steps.
    """
    probability = tf.convert_to_tensor(probability, tf.float64)
    log_none = tf.math.log1p(-probability)
    log_odds = log_u + (tf.math.log(probability) - log_none)
    log_odds = tf.where(rounds.exist(), log_odds, -math.inf)
    large = tf.reduce_sum(tf.maximum(log_odds, 0.0), axis=0)
    product = log_product(1.0 + tf.exp(-tf.abs(log_odds)), 512)
    return large + product + log_none * rounds.of_group()[:, None]


def log_product(factors: tf.Tensor, at_once: int) -> tf.Tensor:
    """Log of the product over the first axis, of which `at_once` are multiplied in float64."""
    starts = range(0, factors.shape[0], at_once)
    return tf.add_n([tf.math.log(tf.reduce_prod(factors[i : i + at_once], axis=0)) for i in starts])
