"""Tree aggregation: noisy sums over the nodes of a binary tree, for comparison."""

from __future__ import annotations

import dataclasses
import math

import numpy as np

from keras_bandmf._checks import checked_choice
from keras_bandmf.strategies.arguments import participation_schema
from keras_bandmf.strategies.baselines.unbanded import (
    UnbandedStrategy,
    check_materialized,
    checked_steps,
)
from keras_bandmf.strategies.participation import (
    fixed_order_maximum,
    is_affordable,
    participations,
    separated_maximum,
)

DECODERS = ("plain", "online", "full")


@dataclasses.dataclass(frozen=True, eq=False)
class TreeStrategy(UnbandedStrategy):
    """Binary tree aggregation: row by row, C sums the steps below a node of a binary tree.

    There is a node for every 2^l steps from a multiple of 2^l that all lie below n. Each column has
    at most `floor(log2 n) + 1` entries, all equal; C is divided by the root of that number. For
    comparison: C is not banded, nor square, so a `TrainingPlan` refuses it. (Dwork et al.,
    "Differential privacy under continual observation", 2010; Kairouz et al., arXiv 2103.00039.)

    Attributes:
      num_steps: n, up to 10^8.
      decoder: how a prefix sum is read off the noisy nodes. "plain": the fewest nodes that make it
        up. "online": each of those nodes first averaged with what the nodes below it say. "full":
        the estimator of least variance from all nodes, `A` times the pseudo-inverse of C. (Honaker,
        "Efficient use of differentially private binary trees", 2015.)
    """

    num_steps: int
    decoder: str = "full"

    def __post_init__(self):
        object.__setattr__(self, "num_steps", checked_steps(self.num_steps))
        checked_choice("decoder", self.decoder, DECODERS)

    @property
    def num_levels(self) -> int:
        """The most nodes a step is below: the squared norm of the first column before scaling."""
        return self.num_steps.bit_length()

    def per_step_error(self) -> np.ndarray:
        """Returns the squared row norms of the decoder B, with `A = B C`, in O(n log n).

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

    def sensitivity(
        self,
        max_participations: int = 1,
        min_separation: int | None = None,
        fixed_order: bool = False,
    ) -> float:
        """Returns the sensitivity of C under a participation schema, or an upper bound on it.

        Args:
          max_participations: most steps an example takes part in.
          min_separation: least distance, in steps, between two of them; needed when
            `max_participations` is above 1.
          fixed_order: whether they are exactly that far apart.

        Returns:
          The sensitivity, exactly for one participation, in fixed order, and where
          `participation.is_affordable`; else an upper bound, which is exact when separation and n
          are powers of two.

        Raises:
          ValueError: an argument is out of its range.

        Formal guarantees:
          Never below the largest norm of `sum_{i in pattern} C[:, i] u_i'` with every u_i of norm
          at most 1, over all patterns the schema allows: C has no negative entry, so that is the
          root of the sum over the nodes of the squared participations below each. The bound takes
          the largest such sum for every level of the tree by itself.
        """
        schema = participation_schema(max_participations, min_separation, fixed_order)
        count, separation, fixed_order = schema
        n = self.num_steps
        fits = participations(n, count, separation)
        if fits == 1:
            return 1.0
        if fixed_order:
            lags = range(0, fits * separation, separation)
            largest = fixed_order_maximum(_common_nodes(n, lags), fits, separation)
        elif is_affordable(n, n - 1, fits, separation):
            lags = (0, *range(separation, n))
            largest = separated_maximum(_common_nodes(n, lags), fits, separation)
        else:
            largest = sum(
                _level_bound(n, level, fits, separation) for level in range(n.bit_length())
            )
        return math.sqrt(largest / self.num_levels)

    def materialize(self) -> np.ndarray:
        """Returns C as a dense matrix, for tests and pictures.

        Returns:
          `(2 n - bits set in n, n)` float64, a row a node: leaves first, each level from left to
          right.

        Raises:
          ValueError: n is above 10,000.
        """
        check_materialized(self.num_steps)
        steps = np.arange(self.num_steps)
        levels = [
            (steps >> level) == np.arange(self.num_steps >> level)[:, None]
            for level in range(self.num_levels)
        ]
        return np.concatenate(levels) / math.sqrt(self.num_levels)


def _subtree_variance(level: int) -> float:
    """Variance of the best estimate of a node's sum from it and the nodes below, at unit noise."""
    # v_0 = 1 and 1 / v_l = 1 + 1 / (2 v_(l-1)).
    return 1.0 / (2.0 - 2.0**-level)


def _full_errors(num_steps: int) -> np.ndarray:
    """Variance of the best estimate of each prefix sum from all nodes, at unit noise.

    The complete trees that make up n, largest first, are independent. In one of them, follow the
    nodes above the first step that is not in the prefix, from the leaf to the root: of the sum s
    of such a node and of the part p of it in the prefix, keep the covariance matrix given all that
    is known below it. A sibling to the left adds to both, one to the right to s; then the node's
    own noisy sum is taken into account.
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


def _common_nodes(num_steps: int, lags: range | tuple[int, ...]) -> dict[int, np.ndarray]:
    """How many nodes are above both of two steps: the diagonals of C'C before scaling."""
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
        # The exponent of a positive integer is its number of bits: the lowest common level.
        lowest = np.frexp(apart.astype(np.float64))[1]
        common = np.maximum(heights[: num_steps - lag] + 1 - lowest, 0)
        products[lag] = np.append(common, np.zeros(lag)).astype(np.float64)
    return products


def _level_bound(num_steps: int, level: int, fits: int, separation: int) -> int:
    """Largest sum of squared participations below the nodes of a level: as many in one as fit."""
    most = min(fits, -(-(1 << level) // separation))
    nodes = num_steps >> level
    filled = min(fits // most, nodes)
    rest = fits - filled * most if filled < nodes else 0
    return filled * most**2 + rest**2
