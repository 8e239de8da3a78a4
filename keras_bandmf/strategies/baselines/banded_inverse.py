"""Strategies whose inverse is banded: the noise of a step is a moving average."""

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

    For comparison: C itself is not banded, so a `TrainingPlan` refuses it. Its sensitivity is
    exact wherever its first column does not increase, as for all sizes tried.
    (Kalinin et al., arXiv 2505.12128.)

    Attributes:
      num_steps: n, up to 10^8.
      num_inverse_bands: the number of bands of C^-1, its diagonal included; n gives the square
        root itself, 1 the identity.
    """

    num_steps: int
    num_inverse_bands: int

    def __post_init__(self):
        num_steps = checked_steps(self.num_steps)
        bands = checked_int("num_inverse_bands", self.num_inverse_bands)
        check_bands(bands, num_steps)
        object.__setattr__(self, "num_steps", num_steps)
        object.__setattr__(self, "num_inverse_bands", bands)

    def inverse_coefficients(self) -> np.ndarray:
        """Returns the first column of C^-1 before scaling: 1, -1/2, -1/8, ..., one a band."""
        # (1 - z)^(1/2) = (1 - z) (1 - z)^(-1/2), and the latter's terms are s_k.
        # s_k - s_(k-1) = -s_k / (2 k - 1), without the cancellation.
        s = square_root_coefficients(self.num_inverse_bands)
        return s / (1.0 - 2.0 * np.arange(self.num_inverse_bands))

    def first_column(self) -> np.ndarray:
        """Returns the first column of C before scaling: `(n,)` float64, the first entry 1."""
        if self.num_inverse_bands == 1:
            return np.append(1.0, np.zeros(self.num_steps - 1))
        route = "scan" if self.num_inverse_bands <= 256 else "fft"
        found = toeplitz.impulse_response(self.inverse_coefficients(), self.num_steps, route)
        return found.numpy()

    def _running_inverse(self) -> np.ndarray:
        # The running sums of (1 - z)^(1/2) are (1 - z)^(-1/2); past the last band they stay.
        sums = square_root_coefficients(self.num_inverse_bands)
        return np.append(sums, np.full(self.num_steps - len(sums), sums[-1]))
