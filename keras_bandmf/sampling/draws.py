"""Which examples each step sees: a pure function of the sampling rule, the key and the step."""

from __future__ import annotations

import dataclasses

import numpy as np
from scipy import stats

from keras_bandmf._checks import checked_int

CYCLIC_POISSON = "cyclic_poisson"
FIXED_ORDER = "fixed_order"

# One stream of random bits for each purpose: they never share a Philox counter.
_GROUPS, _INCLUSION, _ORDER, _PLACES = 1, 2, 3, 4
_PADDING_QUANTILE = 0.999


@dataclasses.dataclass(frozen=True)
class SamplingRule:
    """The public numbers that, with a key, decide the examples of every step.

    Formal guarantees:
        * `num_examples` is taken as the public constant it is declared to be, never from data.
        * Cyclic Poisson: each example has one group, uniform over `num_bands` and independent of
          the others; step t includes each member of group `t % num_bands` independently with
          probability `num_bands * batch_size / num_examples`. Two participations of an example
          are therefore a multiple of `num_bands` steps apart.
        * Fixed order: step t takes block `t % steps_per_epoch` of one fixed permutation: two
          participations of an example are a multiple of `steps_per_epoch` steps apart.
        * Every draw compares exact integers. A probability is rounded down to a multiple of
          2^-64; a group (64 bits modulo `num_bands`) and the order (ties of 64-bit words) are
          uniform up to a total variation of `num_bands * 2^-64` an example and
          `num_examples^2 * 2^-65`.

    Args:
        num_examples: Number of rows of the data, a public constant.
        batch_size: Expected (cyclic Poisson) or exact (fixed order) number of rows of a step.
        num_steps: Number of steps of the whole run.
        num_bands: Bands of the strategy, and the number of groups of cyclic Poisson.
        sampling: `"cyclic_poisson"` or `"fixed_order"`.

    Raises:
        TypeError: A number is not an integer.
        ValueError: A number is out of range, or the numbers do not fit together.
    """

    num_examples: int
    batch_size: int
    num_steps: int
    num_bands: int
    sampling: str = CYCLIC_POISSON

    def __post_init__(self) -> None:
        for name in ("num_examples", "batch_size", "num_steps", "num_bands"):
            object.__setattr__(self, name, checked_int(name, getattr(self, name)))
        if self.sampling not in (CYCLIC_POISSON, FIXED_ORDER):
            raise ValueError(
                "`sampling` must be 'cyclic_poisson' or 'fixed_order'. "
                f"Received: sampling={self.sampling!r}"
            )
        if self.batch_size > self.num_examples:
            raise ValueError(
                "`batch_size` must not exceed `num_examples`. Received: "
                f"batch_size={self.batch_size}, num_examples={self.num_examples}"
            )
        if self.num_bands * self.batch_size > self.num_examples:
            raise ValueError(
                "`num_bands * batch_size` must not exceed `num_examples`: a step would need more "
                "examples than its group (cyclic_poisson) or than the separation of the bands "
                f"(fixed_order) leaves. Received: num_bands={self.num_bands}, "
                f"batch_size={self.batch_size}, num_examples={self.num_examples}. Use at most "
                f"num_bands={self.num_examples // self.batch_size}, or smaller batches."
            )

    @property
    def steps_per_epoch(self) -> int:
        """`num_examples // batch_size`."""
        return self.num_examples // self.batch_size

    def padded_size(self, num_replicas: int = 1) -> int:
        """Rows P of a padded batch, summed over replicas.

        Cyclic Poisson: the 99.9 % quantile of the batch size, Binomial(num_examples, batch_size /
        num_examples), and a masked row for each replica, rounded up to a multiple of
        `8 * num_replicas`. Fixed order: every batch has `batch_size` rows and a masked row for
        each replica, rounded up to a multiple of `num_replicas`.

        Args:
            num_replicas: Number of replicas that share a batch.

        Returns:
            P, a multiple of `num_replicas`. A draw of more than `P - num_replicas` rows takes the
            next multiple of P.
        """
        num_replicas = checked_int("num_replicas", num_replicas)
        if self.sampling == FIXED_ORDER:
            return round_up(self.batch_size + num_replicas, num_replicas)
        rate = self.batch_size / self.num_examples
        quantile = int(stats.binom.ppf(_PADDING_QUANTILE, self.num_examples, rate))
        return round_up(max(quantile, 1) + num_replicas, 8 * num_replicas)

    def draws(self, key: np.ndarray) -> CyclicPoissonDraws | FixedOrderDraws:
        """The draws of a run with this key.

        Args:
            key: Two uint64: the 128 bits of the sampler's key.

        Returns:
            An object whose `indices(t)` are the examples of step t.
        """
        kind = FixedOrderDraws if self.sampling == FIXED_ORDER else CyclicPoissonDraws
        return kind(self, key)


class CyclicPoissonDraws:
    """Cyclic Poisson sampling over random groups (https://arxiv.org/abs/2306.08153, Algorithm 2).

    Here the groups are independent uniform draws, not a partition into equal parts: the
    add-or-remove-one adjacency of the statement needs that.

    Args:
        rule: The public numbers.
        key: Two uint64.
    """

    def __init__(self, rule: SamplingRule, key: np.ndarray):
        self._rule = rule
        self._key = key
        words = bit_stream(key, _GROUPS).random_raw(rule.num_examples)
        # The smallest integer type: NumPy sorts 8 and 16 bits by counting, in O(num_examples).
        group_of = (words % np.uint64(rule.num_bands)).astype(np.min_scalar_type(rule.num_bands))
        sizes = np.bincount(group_of, minlength=rule.num_bands)
        self._members = np.argsort(group_of, kind="stable")
        self._starts = np.concatenate([[0], np.cumsum(sizes)])

    def indices(self, step: int) -> np.ndarray:
        """Examples of a step.

        Args:
            step: The step, 0 <= step < num_steps.

        Returns:
            (k,) int64, increasing; k is random and may be 0.
        """
        rule = self._rule
        group = step % rule.num_bands
        members = self._members[self._starts[group] : self._starts[group + 1]]
        bits = bit_stream(self._key, _INCLUSION, step)
        numerator = rule.num_bands * rule.batch_size
        return members[bernoulli_positions(bits, len(members), numerator, rule.num_examples)]


class FixedOrderDraws:
    """Blocks of one random permutation, the same in every epoch; the remainder never takes part.

    Args:
        rule: The public numbers.
        key: Two uint64.
    """

    def __init__(self, rule: SamplingRule, key: np.ndarray):
        self._rule = rule
        words = bit_stream(key, _ORDER).random_raw(rule.num_examples)
        self._order = np.argsort(words, kind="stable")

    def indices(self, step: int) -> np.ndarray:
        """Examples of a step.

        Args:
            step: The step, 0 <= step < num_steps.

        Returns:
            (batch_size,) int64.
        """
        start = (step % self._rule.steps_per_epoch) * self._rule.batch_size
        return self._order[start : start + self._rule.batch_size]


def bit_stream(key: np.ndarray, purpose: int, step: int = 0) -> np.random.Philox:
    """Philox 4x64 at a counter of its own for each purpose and step.

    Only raw 64-bit words are taken from it: they are the algorithm's output and the same in every
    NumPy version, which is not promised for NumPy's distributions.

    Args:
        key: Two uint64.
        purpose: What the bits are for.
        step: The step they are for.

    Returns:
        A bit generator; its words depend on the arguments alone.
    """
    # Words 0 and 1 of the counter are the position in the stream: 2^128 blocks never run over.
    return np.random.Philox(key=key, counter=np.array([0, 0, step, purpose], np.uint64))


def arrangement(
    key: np.ndarray, step: int, count: int, size: int, num_replicas: int
) -> tuple[np.ndarray, np.ndarray]:
    """Where the rows of a step stand in its padded batch, and what the padding is a copy of.

    Args:
        key: Two uint64.
        step: The step.
        count: Rows that were drawn.
        size: Rows of the padded batch, a multiple of `num_replicas`, at least `count +
            num_replicas`.
        num_replicas: Replica r gets the r-th of as many equal parts of the batch.

    Returns:
        (places, words): (count,) int64, distinct places of the drawn rows, in their order; and
        (size - count,) uint64, random words to choose copies by.

    Formal guarantees: both depend on the arguments alone. In each part one place, uniform, is
    padding; over the other places the order is uniform, up to ties of 64-bit words.
    """
    words = bit_stream(key, _PLACES, step).random_raw(2 * size - count + num_replicas)
    part = size // num_replicas
    sentinels = np.arange(num_replicas) * part + (words[:num_replicas] % np.uint64(part)).astype(
        int
    )
    order = words[num_replicas : num_replicas + size].copy()
    # Sorted last, and never among the first `count`.
    order[sentinels] = np.iinfo(np.uint64).max
    return np.argsort(order, kind="stable")[:count], words[num_replicas + size :]


def bernoulli_positions(
    bits: np.random.BitGenerator, count: int, numerator: int, denominator: int
) -> np.ndarray:
    """Positions of the successes among independent Bernoulli trials.

    A trial succeeds when a 64-bit uniform integer lies below `floor(2^64 p)`. Its upper 16 bits
    decide all but one trial in 65536, so a word serves four trials and only ties draw the rest.

    Args:
        bits: Source of 64-bit words.
        count: Number of trials.
        numerator: Of the probability p.
        denominator: Of the probability p, at least `numerator`.

    Returns:
        Increasing positions, int64, in `[0, count)`.
    """
    threshold = (numerator << 64) // denominator
    if threshold == 1 << 64:
        return np.arange(count)
    high, low = threshold >> 48, threshold & ((1 << 48) - 1)
    words = bits.random_raw(-(-count // 4))
    heads = words.astype("<u8", copy=False).view("<u2")[:count]
    success = heads < np.uint16(high)
    ties = np.flatnonzero(heads == np.uint16(high))
    success[ties] = (bits.random_raw(len(ties)) >> np.uint64(16)) < np.uint64(low)
    return np.flatnonzero(success)


def round_up(value: int, multiple: int) -> int:
    """Smallest multiple of `multiple` that is at least `value`."""
    return -(-value // multiple) * multiple
