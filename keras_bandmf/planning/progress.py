"""A progress bar for the searches of strategies."""

from __future__ import annotations

import math

import keras

from keras_bandmf._checks import checked_int
from keras_bandmf.strategies.search.scipy_lbfgs import Progress


class ProgressBar:
    """Shows the iterations of a search, its loss and its gain, in Keras's progress bar.

    For instance `BandedStrategy.optimize(10_000, 32, callback=bandmf.ProgressBar())`. One bar
    serves any number of searches, one after the other.

    Args:
      target: iterations at which the bar is full; None, as a search ends by its gain and not by
        their number, counts them without.
      verbose: 1 for a bar, 0 for nothing.

    Raises:
      ValueError: an argument is out of its range.
    """

    def __init__(self, target: int | None = None, verbose: int = 1):
        if target is not None:
            target = checked_int("target", target, hint="None where the number is not known.")
        verbose = checked_int("verbose", verbose, 0, "1 for a bar, 0 for nothing.")
        if verbose > 1:
            raise ValueError(f"Expected `verbose` to be 0 or 1. Received: verbose={verbose!r}")
        self._target, self._verbose = target, verbose
        self._bar: keras.utils.Progbar | None = None
        self._last = 0

    def __call__(self, progress: Progress) -> None:
        """Shows one iteration.

        Args:
          progress: what the search reports; its value is the logarithm of a loss.
        """
        if self._bar is None or progress.iteration <= self._last:
            self._bar = keras.utils.Progbar(
                self._target,
                verbose=self._verbose,
                stateful_metrics=("loss", "gain", "target_gain"),
                unit_name="iteration",
            )
        self._last = progress.iteration
        shown = [("loss", math.exp(progress.value))]
        if not math.isnan(progress.gain):
            shown += [("gain", progress.gain), ("target_gain", progress.target_gain)]
        # A bar that is full stays so: Keras's would go past its target.
        done = progress.iteration
        if self._target is not None:
            done = min(done, self._target)
        # The last one always shows, and ends the line.
        self._bar.update(done, shown, finalize=progress.gain < progress.target_gain)
