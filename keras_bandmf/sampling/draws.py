"""The random bits of the sampler: a pure function of the key, the purpose and the step."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

import numpy as np
from scipy import stats

# Of the batch size: what the sizes of a padded batch have room for. A larger draw than the last one
# holds is never cut: it takes the next multiple of that size.
_PADDING_QUANTILES = (0.7, 0.999)

# Words that are drawn at a time: 8 MiB.
_CHUNK = 1 << 20

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
    sure, tied = [], []
    for start, stop in chunks(count):
        words = bits.random_raw(-(-(stop - start) // 4))
        heads = words.astype("<u8", copy=False).view("<u2")[: stop - start]
        sure.append(np.flatnonzero(heads < np.uint16(high)) + start)
        tied.append(np.flatnonzero(heads == np.uint16(high)) + start)
    ties = np.concatenate([*tied, np.empty(0, np.int64)])
    won = ties[(bits.random_raw(len(ties)) >> np.uint64(16)) < np.uint64(low)]
    return np.sort(np.concatenate([*sure, won]))


def chunks(count: int) -> Iterator[tuple[int, int]]:
    """Yields bounds that cut `count` words into pieces of which a few fit into a cache.

    The pieces are a multiple of four words long, for those that serve four trials each.
    """
    for start in range(0, count, _CHUNK):
        yield start, min(start + _CHUNK, count)


class Blocks:
    """Examples sorted by small numbers, such as their groups: 4 bytes an example.

    Args:
        count: Number of blocks.
        numbers: Called as often as needed; yields (first example, numbers) of pieces of the
            examples, in their order. `numbers` is an array of integers below `count`, of one or
            several rows, whose last axis are examples.
        num_examples: N.
    """

    def __init__(
        self,
        count: int,
        numbers: Callable[[], Iterable[tuple[int, np.ndarray]]],
        num_examples: int,
    ):
        sizes = np.zeros(count, np.int64)
        for _, piece in numbers():
            sizes += np.bincount(piece.ravel(), minlength=count)
        self._starts = np.concatenate([[0], np.cumsum(sizes)])
        self._examples = np.empty(self._starts[-1], np.min_scalar_type(max(num_examples - 1, 0)))
        filled = self._starts[:-1].copy()
        for first, piece in numbers():
            order = np.argsort(piece, axis=None, kind="stable")
            found = np.bincount(piece.ravel(), minlength=count)
            # Where the members of each block go: behind those of earlier pieces.
            before = np.concatenate([[0], np.cumsum(found)[:-1]])
            places = np.arange(len(order)) + np.repeat(filled - before, found)
            self._examples[places] = order % piece.shape[-1] + first
            filled += found

    def __getitem__(self, block: int) -> np.ndarray:
        """Returns the examples of a block, in the order of the pieces; a view."""
        return self._examples[self._starts[block] : self._starts[block + 1]]


def round_up(value: int, multiple: int) -> int:
    """Returns the smallest multiple of `multiple` that is at least `value`."""
    return -(-value // multiple) * multiple
