"""Noise that is a moving average of independent rows: what defines it, and what rounding it costs.

Row i is `sum_k d_k z_(i-k)` over p taps d, where C^-1 is a Toeplitz matrix of p bands. The rows of
Z are whole numbers of a lattice `2^TAP_BITS` times finer than that of the released rows.
"""

from __future__ import annotations

import math
from typing import Protocol, runtime_checkable

import numpy as np
import scipy.signal

#: Bits by which the lattice of Z is finer than that of the rows that are released.
TAP_BITS = 16

#: The largest sum of the absolute taps after the first, in units of the first: float64 then holds
#: every sum of rows exactly. Rows of Z are below 2^31 steps of the released lattice.
MOST_TAP_SUM = 16.0

#: Each step has a key of its own, of 16 bytes.
MOST_STEPS = 10**6

#: By how much a row of Z that is drawn again may differ from the first draw, in its lattice steps:
#: one for the rounding to whole numbers, and one for the rounding of float64 in it, below 2^-47 of
#: the radius where two programs compute the same normal of the same words. A radius is below 2^47.
REDRAW = 2.0


@runtime_checkable
class NoiseTaps(Protocol):
    """What the noise needs to know about a strategy whose inverse is banded and Toeplitz.

    `keras_bandmf.strategies.BandedInverseStrategy` has these attributes and methods, and so may a
    class of your own.

    Attributes:
        num_steps: The number of steps n.

    Example:
        >>> import keras_bandmf as bandmf
        >>> strategy = bandmf.strategies.BandedInverseStrategy([1.0, -0.5], num_steps=4)
        >>> strategy.noise_taps().round(3).tolist()
        [1.152, -0.576]
        >>> noise = bandmf.noise.RegeneratedNoise(strategy, stddev=1.0, shapes=[(3,)])
    """

    @property
    def num_steps(self) -> int:
        """The number of steps n."""

    def noise_taps(self) -> np.ndarray:
        """Returns d, the first column of C^-1 down to its last band, float64, of shape (p,)."""


def checked_taps(strategy: NoiseTaps) -> np.ndarray:
    """Returns the taps of a strategy, if the noise can be made of them.

    Args:
        strategy: The strategy, which defines `C^-1`.

    Returns:
        d, float64, of shape (p,).

    Raises:
        ValueError: If they are no such taps, or there are too many steps.
    """
    taps = np.asarray(strategy.noise_taps(), np.float64)
    if taps.ndim != 1 or not taps.size or not np.all(np.isfinite(taps)) or taps[0] <= 0.0:
        raise ValueError(
            "Expected `noise_taps()` to be a vector of finite numbers, the first above 0. "
            f"Received: noise_taps()={taps!r}. Return the first column of C^-1."
        )
    if np.abs(taps[1:]).sum() > MOST_TAP_SUM * taps[0]:
        raise ValueError(
            f"Expected the taps after the first to sum to at most {MOST_TAP_SUM:g} times the "
            "first, in absolute values: beyond that float64 does not hold the sums. Received: "
            f"noise_taps()={taps!r}. Use smaller taps."
        )
    if strategy.num_steps > MOST_STEPS:
        raise ValueError(
            f"Noise that is drawn again has a key for each of at most {MOST_STEPS} steps. "
            f"Received: num_steps={strategy.num_steps}. Use larger batches, or a banded strategy."
        )
    return taps


def largest_row_norm(strategy: NoiseTaps) -> float:
    """Returns the largest norm of a row of `C^-1`, that of its taps.

    Args:
        strategy: The strategy, which defines `C^-1`.
    """
    return float(np.linalg.norm(strategy.noise_taps()))


def rounding_steps(strategy: NoiseTaps) -> float:
    """Returns what rounding costs, in released lattice steps of a coordinate.

    Formal guarantees:
        In units of the fine lattice, with taps divided by the first and T = C / C[0, 0], row i is
        `y_i = g_i + Z_i + F_i`: the whole sum of gradients g_i, the whole `Z_i = rint(a z_i)`, and
        `F_i`, a whole number that depends on earlier z alone and differs from
        `sum_(k >= 1) d_k Z_(i-k)` by at most `err = 1/2 + sum_k |d_k| (REDRAW + (p + 1) 2^-6)`:
        its own rounding, draws that were not repeated to the bit, and the sum in float64, of p
        terms whose sizes add up to at most 2^47 sum |d_k|. What is released is y_i rounded to the
        coarser lattice, a post-processing.
        Neighbors differ by some G - G' = D, whole numbers of the fine lattice. Who sees the real
        numbers `g_i + a z_i + F_i` sees more than y. Given all earlier ones, they are Gaussians of
        deviation a, whose means for the neighbors differ by `s_i = D_i - sum_k d_k s_(i-k) + e_i`,
        with |e_i| <= 2 err: the z that belong to the same view differ by s / a, whole numbers of
        the lattice. So `s = T (D + e)`, and the sum of its squares over all rows is at most
        `B^2 = (|T D| + 2 err |T|_1 sqrt(n size))^2`, for every view. The loss is then that of one
        Gaussian mechanism of sensitivity B: padded by one more Gaussian to a sum of exactly B^2,
        its characteristic function is that of the normal, by induction from the last row. |T|_1 is
        the sum of the absolute entries of its first column, which bounds its norm.

    Args:
        strategy: The strategy, which defines `C^-1`.
    """
    taps = np.asarray(strategy.noise_taps(), np.float64)
    impulse = np.zeros(strategy.num_steps)
    impulse[0] = 1.0
    with np.errstate(over="ignore", invalid="ignore"):
        column = np.abs(scipy.signal.lfilter([1.0], taps, impulse)).sum()
    relative = np.abs(taps[1:]).sum() / taps[0]
    error = 0.5 + relative * (REDRAW + (len(taps) + 1) * 2.0**-6)
    steps = 2.0 * error * column * math.sqrt(strategy.num_steps) * 2.0**-TAP_BITS
    return float(steps) if math.isfinite(steps) else math.inf
