"""A progress bar for the search for a strategy."""

from __future__ import annotations

import math

import keras

from keras_bandmf._checks import checked_int
from keras_bandmf.strategies.search.scipy_lbfgs import Progress


class ProgressBar:
    """A progress bar of Keras that shows the iterations, loss and gain of a search.

    Pass it as `callback` to `optimize` of a strategy. One bar serves any number of searches, one
    after the other.

    Args:
        target: The number of iterations at which the bar is full. With None the bar only counts,
            because a search stops by its gain and not after a fixed number of iterations.
        verbose: 1 for a bar, 0 for nothing.

    Raises:
        TypeError: An argument is not an integer.
        ValueError: An argument is out of range.

    Example:
        >>> import keras_bandmf as bandmf
        >>> strategy = bandmf.strategies.BandedStrategy.optimize(
        ...     50, 4, callback=bandmf.ProgressBar(verbose=0)
        ... )
        >>> strategy.num_bands
        4
    """

    def __init__(self, target: int | None = None, verbose: int = 1):
        if target is not None:
            target = checked_int("target", target, hint="Use None if the number is not known.")
        verbose = checked_int("verbose", verbose, 0, "Use 1 for a bar, 0 for nothing.")
        if verbose > 1:
            raise ValueError(f"Expected `verbose` to be 0 or 1. Received: verbose={verbose!r}.")
        self._target, self._verbose = target, verbose
        self._bar: keras.utils.Progbar | None = None
        self._last = 0

    def __call__(self, progress: Progress) -> None:
        """Shows one iteration.

        Args:
            progress: What the search reports; its value is the logarithm of a loss.
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
        # A full bar stays full: that of Keras would go past its target.
        done = progress.iteration
        if self._target is not None:
            done = min(done, self._target)
        # The last iteration is always shown, and ends the line.
        self._bar.update(done, shown, finalize=progress.gain < progress.target_gain)
