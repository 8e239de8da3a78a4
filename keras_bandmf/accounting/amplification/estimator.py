"""Weighted samples of both divergences of the pair, as compiled TensorFlow graphs."""

from __future__ import annotations

import concurrent.futures
import functools
import math
import os
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import tensorflow as tf

from keras_bandmf.accounting.amplification import proposals
from keras_bandmf.accounting.amplification.laws import (
    AllocationInGroup,
    PoissonInGroup,
    log_mixed,
)
from keras_bandmf.noise import normals

#: Samples are drawn together whose arrays stay in the caches of a processor.
_CHUNK_VALUES = 2**18

_Epsilons = float | Sequence[float] | np.ndarray
_Run = Callable[[tf.Tensor, tf.Tensor], tf.Tensor]


class Moments(NamedTuple):
    """Of the weighted samples, for each epsilon.

    Attributes:
        samples: N.
        mean: shape (epsilons,).
        variance: shape (epsilons,), with N - 1 in the denominator.
        largest: the largest sample, shape (epsilons,).
    """

    samples: int
    mean: np.ndarray
    variance: np.ndarray
    largest: np.ndarray


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
    """

    def __init__(self, columns: np.ndarray, law: PoissonInGroup | AllocationInGroup):
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
        self.columns = columns / norms[:, None]
        rows = law.rounds.most * law.rounds.num_bands
        padded = np.zeros((rows, bands))
        padded[:steps] = self.columns
        # Tensors made eagerly are inputs of a graph: XLA would fold constants for minutes.
        self._padded = tf.constant(padded)
        self._led = tf.constant(np.concatenate([np.zeros((bands - 1, bands)), padded]))
        chunk = max(16, _CHUNK_VALUES // rows // 16 * 16)
        per_chunk = rows * chunk
        self._chunk = chunk
        self._noise_chunks = -(-per_chunk // normals.CHUNK)
        shares = law.weights()[np.arange(steps) % law.rounds.num_bands]
        rounds = law.rounds.of_group()[np.arange(steps) % law.rounds.num_bands]
        if isinstance(law, PoissonInGroup):
            means = shares * law.probability
        else:
            means = shares * law.participations / rounds
        self._mean = self._times(means)
        self._participations = float(means.sum())
        self._mean_rows = tf.constant(np.pad(self._mean, (0, rows - steps))[:, None])
        self._remove = tf.function(self._removed, jit_compile=True, autograph=False)
        self._add_dip = tf.function(self._dipped, jit_compile=True, autograph=False)
        self._add_shift = tf.function(self._shifted, jit_compile=True, autograph=False)

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
    ) -> Moments:
        """Samples of the remove direction from a tilt."""
        run = functools.partial(
            self._remove,
            tf.constant(sigma, tf.float64),
            tf.constant(np.atleast_1d(epsilons), tf.float64),
            tf.constant(tilt.probability, tf.float64),
            tf.constant(float(tilt.power), tf.float64),
            _ends(tilt.chosen),
            _ends(tilt.others),
            tf.constant(tilt.inclusion, tf.float64),
            tf.constant(tilt.log_norms, tf.float64),
        )
        return self._moments(run, samples, seed)

    def dip(
        self,
        sigma: float,
        epsilons: _Epsilons,
        dip: proposals.Dip,
        samples: int,
        seed: int,
    ) -> Moments:
        """Samples of the add direction from a dip."""
        run = functools.partial(
            self._add_dip,
            tf.constant(sigma, tf.float64),
            tf.constant(np.atleast_1d(epsilons), tf.float64),
            *(tf.constant(value, tf.float64) for value in dip),
        )
        return self._moments(run, samples, seed)

    def shift(
        self, sigma: float, epsilons: _Epsilons, theta: float, samples: int, seed: int
    ) -> Moments:
        """Samples of the add direction from a shift."""
        run = functools.partial(
            self._add_shift,
            tf.constant(sigma, tf.float64),
            tf.constant(np.atleast_1d(epsilons), tf.float64),
            tf.constant(theta, tf.float64),
        )
        return self._moments(run, samples, seed)

    @property
    def expected_participations(self) -> float:
        """k: how often an example takes part on average."""
        return self._participations

    @property
    def mean_square(self) -> float:
        """|m|^2 of m = the mean of C X."""
        return float(np.sum(np.square(self._mean)))

    def _moments(self, run: _Run, samples: int, seed: int) -> Moments:
        key = tf.constant(normals.key_from_seed(seed).view(np.int64))
        chunks = -(-samples // self._chunk)
        indices = [tf.constant(index, tf.int64) for index in range(chunks)]
        run(key, indices[0])  # traces
        with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as threads:
            # In the order of the chunks, whichever thread is ready first.
            sums = list(threads.map(lambda index: run(key, index).numpy(), indices))
        total, squares, largest = np.moveaxis(np.asarray(sums), 1, 0)
        if not np.all(np.isfinite(total)):
            raise ValueError(
                "Expected likelihood ratios within the range of float64. Received: "
                f"{self.law} with too little noise. Use a larger noise multiplier."
            )
        count = chunks * self._chunk
        mean = total.sum(axis=0) / count
        variance = np.maximum(squares.sum(axis=0) - count * mean**2, 0.0) / (count - 1)
        return Moments(count, mean, variance, largest.max(axis=0))

    # What follows runs in XLA. Tables of steps have shape (rounds, b, samples).

    def _normals(self, key: tf.Tensor, index: tf.Tensor) -> tf.Tensor:
        """Shape (rows, samples): the noise of a chunk of samples."""
        halves = normals.standard_normals(key, 2 * index, 0, self._noise_chunks, normals.FINE)
        flat = tf.concat(halves, axis=0)[: self._padded.shape[0] * self._chunk]
        return tf.reshape(flat, [self._padded.shape[0], self._chunk])

    def _uniforms(self, key: tf.Tensor, index: tf.Tensor, shape: list[int], use: int) -> tf.Tensor:
        seed = tf.stack([key[0] ^ tf.cast(use, tf.int64), key[1] + index])
        return tf.random.stateless_uniform(shape, seed, dtype=tf.float64, alg="philox")

    def _group(self, key: tf.Tensor, index: tf.Tensor) -> tf.Tensor:
        """One-hot, shape (b, samples): the group of each sample."""
        u = self._uniforms(key, index, [self._chunk], 1)
        ends = np.cumsum(self.law.weights())
        ends[-1] = 1.0
        starts = np.concatenate([[0.0], ends[:-1]])
        return (u >= starts[:, None]) & (u < ends[:, None])

    def _scores(self, y: tf.Tensor) -> tf.Tensor:
        """C' y: shape (rows, samples)."""
        bands = self._padded.shape[1]
        y = tf.pad(y, [[0, bands - 1], [0, 0]])
        rows = self._padded.shape[0]
        return sum(self._padded[:, lag, None] * y[lag : lag + rows] for lag in range(bands))

    def _combined(self, x: tf.Tensor) -> tf.Tensor:
        """C x: shape (rows, samples)."""
        rows, bands = self._padded.shape
        x = tf.pad(x, [[bands - 1, 0], [0, 0]])
        return sum(
            self._led[bands - 1 - lag : bands - 1 - lag + rows, lag, None]
            * x[bands - 1 - lag : bands - 1 - lag + rows]
            for lag in range(bands)
        )

    def _table(self, x: tf.Tensor) -> tf.Tensor:
        rounds = self.law.rounds
        return tf.reshape(x, [rounds.most, rounds.num_bands, self._chunk])

    def _replaced(self, y: tf.Tensor, group: tf.Tensor, x: tf.Tensor) -> tf.Tensor:
        """Scores of noise whose scores in one group are x: columns of a group are orthonormal.

        Args:
            y: noise, (rows, samples).
            group: one-hot, (b, samples).
            x: scores that those of the group are to have, (rounds, b, samples).

        Returns:
            All scores, (rounds, b, samples).
        """
        change = tf.where(group & self.law.rounds.exist(), x - self._table(self._scores(y)), 0.0)
        change = tf.reshape(change, tf.shape(y))
        return self._table(self._scores(y + self._combined(change)))

    def _ratios(self, x: tf.Tensor, sigma: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor, tf.Tensor]:
        """(log u, log L_j with the weight of the group, log L)."""
        log_u = x / sigma - 0.5 / sigma**2
        weighted = self.law.log_ratio(log_u) + np.log(self.law.weights())[:, None]
        return log_u, weighted, tf.reduce_logsumexp(weighted, axis=0)

    def _removed(
        self,
        sigma: tf.Tensor,
        epsilons: tf.Tensor,
        probability: tf.Tensor,
        power: tf.Tensor,
        chosen: tf.Tensor,
        others: tf.Tensor,
        inclusion: tf.Tensor,
        log_norms: tf.Tensor,
        key: tf.Tensor,
        index: tf.Tensor,
    ) -> tf.Tensor:
        """Weighted samples of the remove direction: see `proposals.Tilt`."""
        rounds = self.law.rounds
        group = self._group(key, index)
        small = [rounds.most, 1, self._chunk]
        part = self._pattern(key, index, group, inclusion)
        u = self._uniforms(key, index, small, 2)
        multiples = tf.where(part, 1.0 + _counted(u, chosen), _counted(u, others))
        own = self._own_normals(key, index, small)
        x = self._replaced(self._normals(key, index), group, own + multiples / sigma)
        log_u, weighted, log_ratio = self._ratios(x, sigma)
        exist = rounds.exist()
        log_h = tf.reduce_sum(tf.where(exist, log_mixed(log_u, probability), 0.0), axis=0)
        log_density = tf.reduce_logsumexp(weighted + power * log_h - log_norms[:, None], axis=0)
        gain = -tf.math.expm1(tf.minimum(epsilons[:, None] - log_ratio, 0.0))
        return _sums(gain * tf.exp(log_ratio - log_density))

    def _own_normals(self, key: tf.Tensor, index: tf.Tensor, shape: list[int]) -> tf.Tensor:
        count = math.prod(shape)
        chunks = -(-count // normals.CHUNK)
        halves = normals.standard_normals(key, 2 * index + 1, 0, chunks, normals.FINE)
        return tf.reshape(tf.concat(halves, axis=0)[:count], shape)

    def _pattern(
        self, key: tf.Tensor, index: tf.Tensor, group: tf.Tensor, inclusion: tf.Tensor
    ) -> tf.Tensor:
        """Which rounds of its group a sample takes part in: (rounds, 1, samples), bool."""
        rounds = self.law.rounds
        u = self._uniforms(key, index, [rounds.most, self._chunk], 3)
        if isinstance(self.law, PoissonInGroup):
            return (u < inclusion)[:, None]
        count = tf.reduce_sum(
            tf.where(group, tf.constant(rounds.of_group(), tf.float64)[:, None], 0.0), axis=0
        )
        here = tf.range(rounds.most, dtype=tf.int32)[:, None] < tf.cast(count, tf.int32)
        u = tf.where(here, u, 2.0)
        last = tf.sort(u, axis=0)[self.law.participations - 1]
        return (u <= last)[:, None]

    def _dipped(
        self,
        sigma: tf.Tensor,
        epsilons: tf.Tensor,
        power: tf.Tensor,
        accepted: tf.Tensor,
        rest: tf.Tensor,
        key: tf.Tensor,
        index: tf.Tensor,
    ) -> tf.Tensor:
        """Weighted samples of the add direction for Poisson: see `proposals.Dip`."""
        law, rounds = self.law, self.law.rounds
        if not isinstance(law, PoissonInGroup):
            raise TypeError(f"A dip is for Poisson sampling. Received: law={law}.")
        q = law.probability
        small = [proposals.TRIES + 1, rounds.most, self._chunk]

        def chance(x: tf.Tensor) -> tf.Tensor:
            log_u = x / sigma - 0.5 / sigma**2
            return tf.exp(power * (math.log1p(-q) - log_mixed(log_u, q)))

        tries = self._own_normals(key, index, small)
        fits = self._uniforms(key, index, small, 2) < chance(tries)
        own = tries[-1]
        for trial in reversed(range(proposals.TRIES)):
            own = tf.where(fits[trial], tries[trial], own)
        group = self._group(key, index)
        x = self._replaced(self._normals(key, index), group, own[:, None])
        _, _, log_ratio = self._ratios(x, sigma)
        terms = tf.where(rounds.exist(), tf.math.log(accepted * chance(x) + rest), 0.0)
        weights = np.log(law.weights())[:, None]
        log_density = tf.reduce_logsumexp(weights + tf.reduce_sum(terms, axis=0), axis=0)
        gain = -tf.math.expm1(tf.minimum(epsilons[:, None] + log_ratio, 0.0))
        return _sums(gain * tf.exp(-log_density))

    def _shifted(
        self,
        sigma: tf.Tensor,
        epsilons: tf.Tensor,
        theta: tf.Tensor,
        key: tf.Tensor,
        index: tf.Tensor,
    ) -> tf.Tensor:
        """Weighted samples of the add direction: see `proposals.best_shift`."""
        mean = self._mean_rows
        y = self._normals(key, index) - theta * mean / sigma
        _, _, log_ratio = self._ratios(self._table(self._scores(y)), sigma)
        log_weight = theta * tf.reduce_sum(mean * y, axis=0) / sigma
        log_weight += theta**2 * self.mean_square / (2.0 * sigma**2)
        gain = -tf.math.expm1(tf.minimum(epsilons[:, None] + log_ratio, 0.0))
        return _sums(gain * tf.exp(log_weight))


def _sums(weights: tf.Tensor) -> tf.Tensor:
    """Shape (3, epsilons), of (epsilons, samples): sums, sums of squares, and the largest."""
    return tf.stack(
        [
            tf.reduce_sum(weights, axis=1),
            tf.reduce_sum(tf.square(weights), axis=1),
            tf.reduce_max(weights, axis=1),
        ]
    )


def _counted(u: tf.Tensor, ends: tf.Tensor) -> tf.Tensor:
    """How many of the cumulated probabilities are at most u, float64."""
    return tf.add_n([tf.cast(u >= ends[i], tf.float64) for i in range(ends.shape[0] - 1)])


def _ends(probabilities: np.ndarray) -> tf.Tensor:
    """Cumulated, for the most outcomes there are, so that one trace serves every power."""
    ends = np.full(proposals.LARGEST_POWER + 1, 2.0)
    ends[: len(probabilities) - 1] = np.cumsum(probabilities)[:-1]
    return tf.constant(ends)
