"""Estimates of both divergences of the pair from weighted samples."""

from __future__ import annotations

import concurrent.futures
import functools
import itertools
import math
import os
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import tensorflow as tf

from keras_bandmf._environment import refuse_loose_arithmetic
from keras_bandmf.accounting.amplification import concentration, proposals
from keras_bandmf.accounting.amplification.programs import Columns, Programs
from keras_bandmf.noise import normals
from keras_bandmf.sampling.patterns import AllocationInGroup, PoissonInGroup

_Epsilons = float | Sequence[float] | np.ndarray
_Run = Callable[[tf.Tensor, tf.Tensor], tuple[tf.Tensor, tf.Tensor]]


class OutOfReach(ValueError):
    """Nothing can be certified with the samples allowed: the bound of a known group stands."""


class Moments(NamedTuple):
    """Of the weighted samples, for each epsilon.

    Attributes:
        samples: N.
        mean: shape (epsilons,).
        variance: shape (epsilons,), with N - 1 in the denominator.
        largest: the largest sample, shape (epsilons,).
        log_sums: the sums of log(1 - gamma times a sample), shape (gammas, epsilons), for the
            gammas of `concentration.factors`.
    """

    samples: int
    mean: np.ndarray
    variance: np.ndarray
    largest: np.ndarray
    log_sums: np.ndarray


class _Sums:
    """Sums over samples that weigh `(1 - e^epsilon / L)_+` or `(1 - e^epsilon L)_+` times a weight.

    Args:
        sign: of log L in the event: -1 for the remove and 1 for the add direction.
        epsilons: one or several.
        largest: what no weighted sample exceeds.
    """

    def __init__(self, sign: float, epsilons: _Epsilons, largest: float):
        self._sign, self._epsilons = sign, np.atleast_1d(epsilons)[:, None]
        self._gammas = concentration.factors(largest)[:, None, None]

    def __call__(self, log_ratio: np.ndarray, log_weight: np.ndarray) -> np.ndarray:
        """Sums of samples w, of w^2, the largest w, and sums of log(1 - gamma w) for each gamma.

        Args:
            log_ratio: log L, shape (samples,).
            log_weight: log of the weights, shape (samples,).

        Returns:
            Shape (3 + gammas, epsilons).
        """
        with np.errstate(over="ignore", invalid="ignore", divide="ignore"):
            gain = -np.expm1(np.minimum(self._epsilons + self._sign * log_ratio, 0.0))
            weights = gain * np.exp(log_weight)
            sums = weights.sum(axis=1), np.square(weights).sum(axis=1), weights.max(axis=1)
            return np.concatenate([sums, np.log1p(-self._gammas * weights).sum(axis=2)])


class Estimator:
    """Draws weighted samples for one matrix `C` and one law.

    Formal guarantees: with coordinates in units of sigma, Q is N(0, I) and P the mixture over
    patterns X of N(C X / sigma, I). For the remove direction the weighted samples
    `(1 - e^epsilon / L)_+ L / D` are independent, with the mean `E_P (1 - e^epsilon / L)_+`; for
    the add direction `(1 - e^epsilon L)_+ / D`, with the mean `E_Q (1 - e^epsilon L)_+`. D is the
    density of the proposal with respect to Q. This takes float64 for real numbers, and the words
    of Philox for random ones. A seed decides all samples.

    Args:
        columns: shape (n, b), float64: `columns[i, l]` is `C[i + l, i]`, of norm at most 1, and
            zero beyond the last step. Absolute values are taken, and each column is scaled to norm
            1: the divergences of the pair can only grow with inner products of columns.
        law: the law of patterns.
        report: called with the number of samples that were drawn since it was called last.
    """

    def __init__(
        self,
        columns: np.ndarray,
        law: PoissonInGroup | AllocationInGroup,
        report: Callable[[int], None] | None = None,
    ):
        columns = np.abs(np.asarray(columns, np.float64))
        steps, bands = columns.shape
        if (steps, bands) != (law.rounds.num_steps, law.rounds.num_bands):
            raise ValueError(
                "Expected columns of shape (num_steps, num_bands) of the law. Received: shape "
                f"{columns.shape}, {law.rounds}."
            )
        beyond = np.arange(steps)[:, None] + np.arange(bands) >= steps
        if np.any(columns[beyond]):
            raise ValueError(
                "Expected columns to be zero beyond the last step. Received: entries other than 0 "
                f"in the last {bands - 1} columns. Cut the columns of a longer run off."
            )
        norms = np.linalg.norm(columns, axis=1)
        if not (np.all(norms <= 1.0 + 1e-12) and np.all(norms > 0.0)):
            raise ValueError(
                "Expected columns of norm at most 1, and none without entries. Received: norms "
                f"from {norms.min():.6g} to {norms.max():.6g}. Divide C by its sensitivity."
            )
        self.law = law
        self._report = report
        self.columns = columns / norms[:, None]
        rows = law.rounds.most * law.rounds.num_bands
        self._matrix = Columns.of(self.columns, rows)
        self._programs = _programs_of(law)
        shares = law.weights()[np.arange(steps) % law.rounds.num_bands]
        rounds = law.rounds.of_group()[np.arange(steps) % law.rounds.num_bands]
        if isinstance(law, PoissonInGroup):
            means = shares * law.probability
        else:
            means = shares * law.participations / rounds
        self._mean = self._times(means)
        self._participations = float(means.sum())
        direction = self._mean / math.sqrt(self.mean_square)
        self._direction = tf.constant(np.pad(direction, (0, rows - steps)))

    def _times(self, pattern: np.ndarray) -> np.ndarray:
        """C times a vector, float64, shape (n,)."""
        steps, bands = self.columns.shape
        total = np.zeros(steps + bands)
        for lag in range(bands):
            total[lag : lag + steps] += self.columns[:, lag] * pattern
        return total[:steps]

    def remove(
        self,
        sigma: float,
        epsilons: _Epsilons,
        tilt: proposals.Tilt,
        samples: int,
        seed: int,
        largest: float = math.inf,
    ) -> Moments:
        """Samples of the remove direction from a tilt, `largest` being what they cannot exceed."""
        tilt = tilt._replace(chosen=_ends(tilt.chosen), others=_ends(tilt.others))
        run = self._run(self._programs.remove, sigma, tilt)
        return self._moments(run, _Sums(-1.0, epsilons, largest), samples, seed)

    def dip(
        self,
        sigma: float,
        epsilons: _Epsilons,
        dip: proposals.Dip,
        samples: int,
        seed: int,
        largest: float = math.inf,
    ) -> Moments:
        """Samples of the add direction from a dip."""
        run = self._run(self._programs.dip, sigma, dip)
        return self._moments(run, _Sums(1.0, epsilons, largest), samples, seed)

    def shift(
        self,
        sigma: float,
        epsilons: _Epsilons,
        tilt: float,
        samples: int,
        seed: int,
        largest: float = math.inf,
    ) -> Moments:
        """Samples of the add direction from a shift that covers the least of the epsilons."""
        shift = proposals.shift(
            self.mean_square, self._participations, sigma, float(np.min(epsilons)), tilt
        )
        run = self._run(self._programs.shift, sigma, shift, self._direction)
        return self._moments(run, _Sums(1.0, epsilons, largest), samples, seed)

    def _run(self, program: Callable[..., Any], sigma: float, proposal: Any, *more: Any) -> _Run:
        """A program of samples with all but its key and the number of its chunk."""
        tensors = (tf.constant(value, tf.float64) for value in proposal)
        sigma = tf.constant(sigma, tf.float64)
        return functools.partial(program, self._matrix, sigma, type(proposal)(*tensors), *more)

    @property
    def expected_participations(self) -> float:
        """k: how often an example takes part on average."""
        return self._participations

    @property
    def mean_square(self) -> float:
        """|m|^2 of m = the mean of C X."""
        return float(np.sum(np.square(self._mean)))

    def _moments(self, run: _Run, sums_of: _Sums, samples: int, seed: int) -> Moments:
        refuse_loose_arithmetic()
        key = tf.constant(normals.key_from_seed(seed).view(np.int64))
        chunks = -(-samples // self._programs.chunk)

        def sums_of_chunk(index: int) -> np.ndarray:
            with tf.device("CPU:0"):
                logs = run(key, tf.constant(index, tf.int64))
            return sums_of(*(log.numpy() for log in logs))

        first, sums = sums_of_chunk(0), []  # traces
        with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as threads:
            others = threads.map(sums_of_chunk, range(1, chunks))
            # In the order of the chunks, whichever thread is ready first.
            for of_chunk in itertools.chain([first], others):
                sums.append(of_chunk)
                if self._report is not None:
                    self._report(self._programs.chunk)
        table = np.asarray(sums)
        total, squares, largest = np.moveaxis(table[:, :3], 1, 0)
        if not np.all(np.isfinite(total)):
            raise OutOfReach(
                "Expected likelihood ratios within the range of float64. Received: "
                f"{self.law} with too little noise. Use a larger noise multiplier."
            )
        count = chunks * self._programs.chunk
        mean = total.sum(axis=0) / count
        variance = np.maximum(squares.sum(axis=0) - count * mean**2, 0.0) / (count - 1)
        return Moments(count, mean, variance, largest.max(axis=0), table[:, 3:].sum(axis=0))


_programs_of = functools.lru_cache(maxsize=8)(Programs)


def _ends(probabilities: np.ndarray) -> np.ndarray:
    """Cumulated, for the most outcomes there are, so that one trace serves every power."""
    ends = np.full(proposals.LARGEST_POWER + 1, 2.0)
    ends[: len(probabilities) - 1] = np.cumsum(probabilities)[:-1]
    return ends
