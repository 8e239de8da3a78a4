"""A progress bar for a search for a strategy, a calibration, and the conversion of a stream.

What is shown goes where Keras writes: see `show`.
"""

from __future__ import annotations

import logging
import math
import sys
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import keras

from keras_bandmf._checks import checked_int
from keras_bandmf.sampling.stores.files import ConversionProgress
from keras_bandmf.strategies.search.scipy_lbfgs import Progress

_LOGGER = logging.getLogger(__name__)


def show(text: str, verbose: Any = 1) -> None:
    """Shows a text where Keras shows its progress: on standard output, or in the log.

    Args:
        text: The text.
        verbose: As in `keras.Model.fit`. 0 writes to the log only, and so does
            `keras.config.disable_interactive_logging()`.
    """
    if verbose == 0 or not keras.config.is_interactive_logging_enabled():
        _LOGGER.info("%s", text)
        return
    sys.stdout.write(f"{text}\n")
    sys.stdout.flush()


class CalibrationProgress(NamedTuple):
    """The state of a calibration, as the `callback` of `TrainingPlan.calibrate` receives it.

    Attributes:
        stage: "compare" while bands and coefficients are compared, "certify" while the chosen ones
            are certified, "done" at the end.
        num_bands: The number of bands that is looked at.
        samples: How many samples were drawn so far.
    """

    stage: Literal["compare", "certify", "done"]
    num_bands: int
    samples: int


class Watch:
    """Counts the samples of a calibration, and tells a callback.

    Args:
        callback: Called with a `CalibrationProgress`; None for nothing.
    """

    def __init__(self, callback: Callable[[CalibrationProgress], object] | None):
        self._callback = callback
        self._samples = 0
        self._num_bands = 0

    def at(
        self, stage: Literal["compare", "certify"], num_bands: int
    ) -> Callable[[int], None] | None:
        """Returns what is to be called with each number of new samples, or None for nothing.

        Args:
            stage: What they are drawn for.
            num_bands: The number of bands that is looked at.
        """
        callback = self._callback
        if callback is None:
            return None
        self._num_bands = num_bands

        def report(samples: int) -> None:
            self._samples += samples
            callback(CalibrationProgress(stage, num_bands, self._samples))

        return report

    def end(self) -> None:
        """Tells that the calibration is done, if anything was told before."""
        if self._callback is not None and self._samples:
            self._callback(CalibrationProgress("done", self._num_bands, self._samples))


#: Nobody is told.
UNWATCHED = Watch(None)


class ProgressBar:
    """A progress bar of Keras, for a search, a calibration, or the conversion of a stream.

    It shows iterations, loss and gain; samples; or rows.

    Pass it as `callback` to `optimize` of a strategy, to `TrainingPlan.calibrate` or to
    `sources.convert`. One bar serves any number of them, one after the other.

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

    def __call__(self, progress: Progress | CalibrationProgress | ConversionProgress) -> None:
        """Shows one iteration, or some more samples or rows.

        Args:
            progress: What the search reports; its value is the logarithm of a loss.
        """
        if isinstance(progress, CalibrationProgress):
            self._show_samples(progress)
            return
        if isinstance(progress, ConversionProgress):
            self._show_rows(progress)
            return
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

    def _show_samples(self, progress: CalibrationProgress) -> None:
        if self._bar is None or progress.samples < self._last:
            self._bar = keras.utils.Progbar(
                None, verbose=self._verbose, stateful_metrics=("bands",), unit_name="sample"
            )
        self._last = progress.samples
        done = progress.stage == "done"
        self._bar.update(progress.samples, [("bands", progress.num_bands)], finalize=done)
        if done:
            self._bar, self._last = None, 0

    def _show_rows(self, progress: ConversionProgress) -> None:
        if self._bar is None or progress.rows < self._last:
            self._bar = keras.utils.Progbar(progress.total, verbose=self._verbose, unit_name="row")
        self._last = progress.rows
        self._bar.update(progress.rows, finalize=progress.done)
        if progress.done:
            self._bar, self._last = None, 0
