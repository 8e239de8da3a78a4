"""What the optimizer needs of the carriers of all variables of one run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import tensorflow as tf

from keras_bandmf.clipping.coordinates import coordinates_of, released_shape
from keras_bandmf.noise import NoiseTaps
from keras_bandmf.rgp.carrier import Carrier


class RunCarriers:
    """The variables of a run, in the coordinates in which their gradients are released.

    Formal guarantees:
        The strategy correlates no noise across a refresh of carriers, where a row of noise would
        no longer mean the same directions; clipped sums in other coordinates than those the noise
        was made for are refused.

    Args:
        variables: The trainable variables, in the optimizer's order.
        strategy: The strategy that defines the matrix C of the noise.

    Attributes:
        shapes: The shape of each variable's entry in a clipped sum.

    Raises:
        ValueError: If the strategy correlates noise across a refresh.
    """

    def __init__(self, variables: Sequence[Any], strategy: Any):
        self._variables = list(variables)
        self._carriers = [coordinates_of(variable) for variable in variables]
        self.shapes = [released_shape(variable) for variable in variables]
        found = [carrier for carrier in self._carriers if isinstance(carrier, Carrier)]
        for period in sorted({c.refresh_every for c in found if c.fixed is None}):
            _check_blocks(strategy, period)

    @property
    def description(self) -> list:
        """Ranks, layouts and refreshes, for a fingerprint; empty without carriers."""
        found = [None if c is None else c.description for c in self._carriers]
        return found if any(found) else []

    def start(self, key: np.ndarray) -> None:
        """Draws the random carriers the run begins with, and remembers the weights."""
        for index, (variable, carrier) in enumerate(
            zip(self._variables, self._carriers, strict=True)
        ):
            if carrier is not None:
                carrier.start(variable, key, index)

    def check_sums(self, sums: Sequence[tf.Tensor]) -> None:
        """Refuses clipped sums in other coordinates.

        Raises:
            ValueError: If a shape differs.
        """
        received = [total.shape for total in sums]
        if not all(a.is_compatible_with(b) for a, b in zip(received, self.shapes, strict=True)):
            raise ValueError(
                "Expected gradients in the coordinates that the optimizer was built for, of shapes "
                f"{self.shapes}. Carriers were put on the model, or taken off it, since then. "
                f"Compile and build a new optimizer. Received: shapes {received}"
            )

    def gradients(self, coordinates: Sequence[tf.Tensor]) -> list[tf.Tensor]:
        """Returns gradients of the variables, in their shapes, from noisy sums in coordinates.

        Formal guarantees:
            What is returned depends on the noisy sums alone, which have the whole noise, also
            where copies of the carriers differ, as rounding may differ between devices.

        Args:
            coordinates: The noisy sums over all replicas.

        Returns:
            The gradients to apply.
        """
        return [
            found if carrier is None else carrier.reconstruct(found)
            for found, carrier in zip(coordinates, self._carriers, strict=True)
        ]

    def refresh(self, step: tf.Tensor, replica: int) -> None:
        """Refreshes the carriers that are due before step `step`, in a replica context."""
        step = tf.cast(step, tf.int64)
        for variable, carrier in zip(self._variables, self._carriers, strict=True):
            if carrier is not None:
                carrier.refresh(variable, step, replica)

    def to_arrays(self) -> dict[str, np.ndarray]:
        """Returns the carriers, to be saved with the run."""
        return {
            f"carrier_{index}_{name}": value
            for index, carrier in enumerate(self._carriers)
            if carrier is not None
            for name, value in carrier.to_arrays().items()
        }

    def from_arrays(self, arrays: Mapping[str, np.ndarray]) -> None:
        """Takes over what `to_arrays` returned.

        Raises:
            ValueError: If a carrier is missing, damaged, or of another rank.
        """
        for index, carrier in enumerate(self._carriers):
            if carrier is not None:
                lead = f"carrier_{index}_"
                carrier.from_arrays(
                    {k.removeprefix(lead): v for k, v in arrays.items() if k.startswith(lead)}
                )

    def __str__(self) -> str:
        """Returns what is released, in words; empty without carriers."""
        found = [c for c in self._carriers if isinstance(c, Carrier)]
        if not found:
            return ""
        ranks = sorted({c.rank for c in found})
        words = []
        if periods := sorted({c.refresh_every for c in found if c.fixed is None}):
            words.append(f"refreshed every {', '.join(map(str, periods))} steps")
        if any(c.fixed is not None for c in found):
            words.append("fixed ones that were given, which are taken as public")
        return (
            f"gradients of {len(found)} kernels in low-rank coordinates (RGP, rank "
            f"{', '.join(map(str, ranks))}; carriers: {', and '.join(words)})"
        )


def _check_blocks(strategy: Any, period: int) -> None:
    if strategy.num_bands == 1:
        return
    # Taps know no blocks: noise that is drawn again is correlated across every step.
    taps = isinstance(strategy, NoiseTaps)
    rows = np.zeros((0, 0)) if taps else np.asarray(strategy.noise_rows())
    steps = np.arange(len(rows)) % period
    across = np.arange(rows.shape[1]) > steps[:, None]
    if len(rows) != strategy.num_steps or np.any(rows[across] != 0.0):
        raise ValueError(
            "Expected noise that is not correlated across a refresh of the carriers, where it "
            "would cancel in another basis and training would be worse than with independent "
            "noise. Use num_bands=1, `enable_rgp(..., carriers=public_carriers(...))`, or "
            f"`strategies.BlockDiagonalStrategy.optimize(num_steps, num_bands, {period})`. "
            f"Received: strategy={strategy!r}, refresh_every={period}"
        )
