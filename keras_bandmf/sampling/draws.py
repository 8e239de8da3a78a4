"""The random bits of the sampler: a pure function of the key, the purpose and the step."""

from __future__ import annotations

import numpy as np
from scipy import stats

# Of the batch size: what the sizes of a padded batch have room for. A larger draw than the last one
# holds is never cut: it takes the next multiple of that size.
_PADDING_QUANTILES = (0.7, 0.999)

# One stream of random bits for each purpose, so that no two of them share a Philox counter. A new
# sampling law takes new numbers; the ones here may never change, or a restored run would regroup
# its examples.
GROUPS, INCLUSION, ORDER, PLACES, ALLOCATION, UNIT_ROWS, VIEWS = 1, 2, 3, 4, 5, 6, 7


def bit_stream(key: np.ndarray, purpose: int, step: int = 0) -> np.random.Philox:
    """Returns a Philox 4x64 generator at a counter of its own for each purpose and step.

    Only raw 64-bit words are taken from it, because they are the algorithm's output and the same
    in every NumPy version, which is not promised for NumPy's distributions.

    Args:
        key: Two uint64.
        purpose: What the bits are for: one of the constants of this file.
        step: The step that they are for.

    Returns:
        A bit generator; its words depend on the arguments alone.
    """
    # Words 0 and 1 of the counter are the position in the stream: 2^128 blocks never run over.
    return np.random.Philox(key=key, counter=np.array([0, 0, step, purpose], np.uint64))


def arrangement(
    key: np.ndarray, step: int, count: int, size: int, num_replicas: int
) -> tuple[np.ndarray, np.ndarray]:
    """Returns where the rows of a step stand in its padded batch, and what fills the padding.

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
    words = bit_stream(key, PLACES, step).random_raw(2 * size - count + num_replicas)
    part = size // num_replicas
    sentinels = np.arange(num_replicas) * part + (words[:num_replicas] % np.uint64(part)).astype(
        int
    )
    order = words[num_replicas : num_replicas + size].copy()
    # Sorted last, and never among the first `count`.
    order[sentinels] = np.iinfo(np.uint64).max
    return np.argsort(order, kind="stable")[:count], words[num_replicas + size :]


def binomial_padded_sizes(num_examples: int, rate: float, num_replicas: int) -> tuple[int, ...]:
    """Returns the 70 % and the 99.9 % quantile of a binomial batch size, with room for masked rows.

    A masked row for each replica is added, and the sum is rounded up to a multiple of
    `8 * num_replicas`.

    Args:
        num_examples: N.
        rate: The probability of each example to be in the batch.
        num_replicas: Number of replicas that share a batch.

    Returns:
        One or two increasing sizes, the last one P.
    """
    quantiles = stats.binom.ppf(_PADDING_QUANTILES, num_examples, rate)
    sizes = {round_up(max(int(q), 1) + num_replicas, 8 * num_replicas) for q in quantiles}
    return tuple(sorted(sizes))


def bernoulli_positions(
    bits: np.random.BitGenerator, count: int, numerator: int, denominator: int
) -> np.ndarray:
    """Returns the positions of the successes among independent Bernoulli trials.

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
    """Returns the smallest multiple of `multiple` that is at least `value`."""
    return -(-value // multiple) * multiple
