"""Tree aggregation, for comparison: noisy sums over the nodes of a binary tree."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable
from typing import Literal, get_args

import numpy as np

from keras_bandmf._checks import checked_choice
from keras_bandmf.strategies.participation import (
    fixed_order_maximum,
    is_affordable,
    participations,
    separated_maximum,
)
from keras_bandmf.strategies.unbanded import UnbandedStrategy, checked_steps

Decoder = Literal["plain", "online", "full"]
DECODERS: tuple[str, ...] = get_args(Decoder)


@dataclasses.dataclass(frozen=True, eq=False)
class TreeStrategy(UnbandedStrategy):
    """Binary tree aggregation: each row of C sums the steps below one node of a binary tree.

    There is a node for each block of 2^l steps that starts at a multiple of 2^l and ends before
    step n. A column has at most `floor(log2 n) + 1` entries, all equal, and C is divided by the
    square root of that number. This strategy is for comparison only: C is neither banded nor
    square, so a `TrainingPlan` refuses it. (Dwork et al., "Differential privacy under continual
    observation", 2010; Kairouz et al., arXiv 2103.00039.)

    `sensitivity` is exact for one participation and in fixed order. Without a fixed order it is
    exact if there are few steps or participations are far apart; else it is an upper bound, which
    is exact if the separation and n are powers of two.

    Attributes:
      num_steps: n, up to 10^8.
      decoder: how a prefix sum is computed from the noisy nodes. "plain" adds the fewest nodes that
        make it up. "online" first averages each of those nodes with what the nodes below it say.
        "full" is the estimator of least variance from all nodes, `A` times the pseudo-inverse of C.
        (Honaker, "Efficient use of differentially private binary trees", 2015.)

    Example:
      >>> import keras_bandmf as bandmf
      >>> tree = bandmf.strategies.TreeStrategy(num_steps=4, decoder="plain")
      >>> tree.num_levels
      3
      >>> tree.per_step_error()
      array([3., 3., 6., 3.])
    """

    num_steps: int
    decoder: Decoder = "full"

    def __post_init__(self) -> None:
        object.__setattr__(self, "num_steps", checked_steps(self.num_steps))
        checked_choice("decoder", self.decoder, DECODERS)

    @property
    def num_levels(self) -> int:
        """The number of levels of the tree: the squared norm of its first column before scaling."""
        return self.num_steps.bit_length()

    def per_step_error(self) -> np.ndarray:
        """Returns the squared row norms of the decoder B, where `A = B C`, in O(n log n).

        Returns:
          `(n,)` float64: the variance of the i-th prefix sum at unit noise.
        """
        if self.decoder == "full":
            return self.num_levels * _full_errors(self.num_steps)
        ends = np.arange(1, self.num_steps + 1)
        errors = np.zeros(self.num_steps)
        for level in range(self.num_levels):
            variance = _subtree_variance(level) if self.decoder == "online" else 1.0
            errors += variance * ((ends >> level) & 1)
        return self.num_levels * errors

    def _sensitivity(
        self, max_participations: int, min_separation: int, fixed_order: bool
    ) -> float:
        """Returns the sensitivity for a checked schema, with the guarantee of `sensitivity`.

        C has no negative entry, so the sensitivity is the root of the sum over the nodes of the
        squared number of participations below each. The bound takes the largest such sum for every
        level of the tree separately.
        """
        separation = min_separation
        n = self.num_steps
        fits = participations(n, max_participations, separation)
        if fits == 1:
            return 1.0
        if fixed_order:
            products = _common_nodes(n, range(0, fits * separation, separation))
            largest = fixed_order_maximum(products, fits, separation)
        elif is_affordable(n, n - 1, fits, separation):
            products = _common_nodes(n, (0, *range(separation, n)))
            largest = separated_maximum(products, fits, separation)
        else:
            largest = sum(
                _level_bound(n, level, fits, separation) for level in range(n.bit_length())
            )
        return math.sqrt(largest / self.num_levels)

    def _matrix(self) -> np.ndarray:
        """Returns C, `(2 n - number of ones among the bits of n, n)`.

        Each row is a node: leaves first, and each level from left to right.
        """
        steps = np.arange(self.num_steps)
        levels = [
            (steps >> level) == np.arange(self.num_steps >> level)[:, None]
            for level in range(self.num_levels)
        ]
        return np.concatenate(levels) / math.sqrt(self.num_levels)


def _subtree_variance(level: int) -> float:
    """Returns the variance, at unit noise, of a node's sum estimated from it and those below."""
    # v_0 = 1 and 1 / v_l = 1 + 1 / (2 v_(l-1)).
    return 1.0 / (2.0 - 2.0**-level)


def _full_errors(num_steps: int) -> np.ndarray:
    """Returns the variance, at unit noise, of each prefix sum estimated from all nodes.

    The complete trees that make up n, largest first, are independent. In one of them, the loop
    follows the nodes above the first step after the prefix, from the leaf to the root. Let s be the
    sum of such a node and p the part of s that is in the prefix. The loop keeps the covariance of
    s and p given everything that is known below the node: a sibling to the left adds to both, one
    to the right to s only, and then the node's own noisy sum is taken into account.
    """
    errors = np.empty(num_steps + 1)
    before, first = 0.0, 0
    for height in reversed(range(num_steps.bit_length())):
        if not (num_steps >> height) & 1:
            continue
        ends = np.arange(1 << height)
        of_sum, of_part, of_both = np.ones(len(ends)), np.zeros(len(ends)), np.zeros(len(ends))
        for level in range(height):
            sibling = _subtree_variance(level)
            left = sibling * ((ends >> level) & 1)
            of_sum, of_part, of_both = of_sum + sibling, of_part + left, of_both + left
            of_part -= of_both**2 / (of_sum + 1.0)
            of_both /= of_sum + 1.0
            of_sum /= of_sum + 1.0
        errors[first : first + len(ends)] = before + of_part
        first += len(ends)
        before += _subtree_variance(height)
    errors[num_steps] = before
    return errors[1:]


def _common_nodes(num_steps: int, lags: Iterable[int]) -> dict[int, np.ndarray]:
    """Returns how many nodes are above both of two steps: the diagonals of C'C before scaling."""
    steps = np.arange(num_steps)
    heights = np.empty(num_steps, np.int64)
    first = 0
    for height in reversed(range(num_steps.bit_length())):
        if (num_steps >> height) & 1:
            heights[first : first + (1 << height)] = height
            first += 1 << height
    products = {}
    for lag in lags:
        apart = steps[: num_steps - lag] ^ steps[lag:]
        # The exponent of a positive integer is its number of bits, here the lowest common level.
        lowest = np.frexp(apart.astype(np.float64))[1]
        common = np.maximum(heights[: num_steps - lag] + 1 - lowest, 0)
        products[lag] = np.append(common, np.zeros(lag)).astype(np.float64)
    return products


def _level_bound(num_steps: int, level: int, fits: int, separation: int) -> int:
    """Returns the largest sum of squared participations below the nodes of a level.

    It is reached when as many participations as possible are below the same node.
    """
    most = min(fits, -(-(1 << level) // separation))
    nodes = num_steps >> level
    filled = min(fits // most, nodes)
    rest = fits - filled * most if filled < nodes else 0
    return filled * most**2 + rest**2
