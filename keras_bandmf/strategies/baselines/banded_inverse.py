"""Strategies whose inverse is banded, so that the noise of a step is a moving average."""

from __future__ import annotations

import dataclasses

import numpy as np

from keras_bandmf._checks import checked_int
from keras_bandmf.strategies.arguments import check_bands
from keras_bandmf.strategies.baselines.unbanded import UnbandedToeplitz, checked_steps
from keras_bandmf.strategies.coefficients import square_root_coefficients
from keras_bandmf.strategies.errors import toeplitz


@dataclasses.dataclass(frozen=True, eq=False)
class BandedInverseStrategy(UnbandedToeplitz):
    """The banded inverse square root: C^-1 is Toeplitz with the first terms of `(1 - z)^(1/2)`.

    This strategy is for comparison only: C itself is not banded, so a `TrainingPlan` refuses it.
    `sensitivity` is exact wherever the first column of C does not increase, as for all sizes that
    were tried, and an upper bound elsewhere. (Kalinin et al., arXiv 2505.12128.)

    Attributes:
      num_steps: n, up to 10^8.
      num_inverse_bands: the number of bands of C^-1, its diagonal included. n gives the square
        root of prefix sums, 1 the identity.

    Example:
      >>> import keras_bandmf as bandmf
      >>> strategy = bandmf.strategies.BandedInverseStrategy(num_steps=100, num_inverse_bands=4)
      >>> strategy.inverse_coefficients()
      array([ 1.    , -0.5   , -0.125 , -0.0625])
      >>> round(strategy.loss(), 2)
      9.78
    """

    num_steps: int
    num_inverse_bands: int

    def __post_init__(self) -> None:
        num_steps = checked_steps(self.num_steps)
        bands = checked_int("num_inverse_bands", self.num_inverse_bands)
        check_bands(bands, num_steps)
        object.__setattr__(self, "num_steps", num_steps)
        object.__setattr__(self, "num_inverse_bands", bands)

    def inverse_coefficients(self) -> np.ndarray:
        """Returns the first column of C^-1 before scaling, up to its last band.

        Returns:
          `(num_inverse_bands,)` float64: 1, -1/2, -1/8, ...
        """
        # (1 - z)^(1/2) = (1 - z) (1 - z)^(-1/2), and the terms of the second factor are s_k. The
        # difference s_k - s_(k-1) is written as -s_k / (2 k - 1), which does not cancel.
        s = square_root_coefficients(self.num_inverse_bands)
        return s / (1.0 - 2.0 * np.arange(self.num_inverse_bands))

    def first_column(self) -> np.ndarray:
        """Returns the first column of C before scaling.

        Returns:
          `(n,)` float64, the first entry 1.
        """
        if self.num_inverse_bands == 1:
            return np.append(1.0, np.zeros(self.num_steps - 1))
        route: toeplitz.ResponseRoute = "scan" if self.num_inverse_bands <= 256 else "fft"
        found = toeplitz.impulse_response(self.inverse_coefficients(), self.num_steps, route)
        return found.numpy()

    def _running_inverse(self) -> np.ndarray:
        # The running sums of (1 - z)^(1/2) are (1 - z)^(-1/2). After the last band they are
        # constant.
        sums = square_root_coefficients(self.num_inverse_bands)
        return np.append(sums, np.full(self.num_steps - len(sums), sums[-1]))
