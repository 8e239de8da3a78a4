"""The compiled TensorFlow graphs of weighted samples.

They know the law and the number of steps and bands; the columns of C are an input. So one
compilation serves all matrices that are compared.
"""

from __future__ import annotations

import math

import numpy as np
import tensorflow as tf

from keras_bandmf.accounting.amplification import proposals
from keras_bandmf.noise import normals
from keras_bandmf.sampling.patterns import (
    AllocationInGroup,
    PoissonInGroup,
    log_mixed,
)

#: Samples are drawn together whose arrays stay in the caches of a processor.
_CHUNK_VALUES = 2**18


class Programs:
    """The graphs of one law. Tables of steps have shape (rounds, b, samples).

    Each of `remove`, `dip` and `shift` takes `columns`, of shape (rows, b) with rows of zeros for
    places of the table that are no steps, then sigma, the epsilons, the numbers of its proposal,
    and at last a key and the number of the chunk of samples. It returns sums, sums of squares and
    the largest of the weighted samples, shape (3, epsilons).

    Args:
        law: the law.
    """

    def __init__(self, law: PoissonInGroup | AllocationInGroup):
        self.law = law
        self._rows = law.rounds.most * law.rounds.num_bands
        self.chunk = max(16, _CHUNK_VALUES // self._rows // 16 * 16)
        self.remove = tf.function(self._removed, jit_compile=True, autograph=False)
        self.dip = tf.function(self._dipped, jit_compile=True, autograph=False)
        self.shift = tf.function(self._shifted, jit_compile=True, autograph=False)

    def _normals(self, key: tf.Tensor, index: tf.Tensor) -> tf.Tensor:
        """Shape (rows, samples): the noise of a chunk of samples."""
        halves = normals.standard_normals(
            key, 2 * index, 0, -(-self._rows * self.chunk // normals.CHUNK), normals.FINE
        )
        flat = tf.concat(halves, axis=0)[: self._rows * self.chunk]
        return tf.reshape(flat, [self._rows, self.chunk])

    def _uniforms(self, key: tf.Tensor, index: tf.Tensor, shape: list[int], use: int) -> tf.Tensor:
        seed = tf.stack([key[0] ^ tf.cast(use, tf.int64), key[1] + index])
        return tf.random.stateless_uniform(shape, seed, dtype=tf.float64, alg="philox")

    def _group(self, key: tf.Tensor, index: tf.Tensor) -> tf.Tensor:
        """One-hot, shape (b, samples): the group of each sample."""
        u = self._uniforms(key, index, [self.chunk], 1)
        ends = np.cumsum(self.law.weights())
        ends[-1] = 1.0
        starts = np.concatenate([[0.0], ends[:-1]])
        return (u >= starts[:, None]) & (u < ends[:, None])

    def _scores(self, columns: tf.Tensor, y: tf.Tensor) -> tf.Tensor:
        """C' y: shape (rows, samples)."""
        bands, rows = self.law.rounds.num_bands, self._rows
        y = tf.pad(y, [[0, bands - 1], [0, 0]])
        return tf.add_n([columns[:, lag, None] * y[lag : lag + rows] for lag in range(bands)])

    def _combined(self, columns: tf.Tensor, x: tf.Tensor) -> tf.Tensor:
        """C x: shape (rows, samples)."""
        bands, rows = self.law.rounds.num_bands, self._rows
        columns, x = (tf.pad(value, [[bands - 1, 0], [0, 0]]) for value in (columns, x))
        starts = [bands - 1 - lag for lag in range(bands)]
        return tf.add_n(
            [
                columns[start : start + rows, lag, None] * x[start : start + rows]
                for lag, start in enumerate(starts)
            ]
        )

    def _table(self, x: tf.Tensor) -> tf.Tensor:
        rounds = self.law.rounds
        return tf.reshape(x, [rounds.most, rounds.num_bands, self.chunk])

    def _replaced(
        self, columns: tf.Tensor, y: tf.Tensor, group: tf.Tensor, x: tf.Tensor
    ) -> tf.Tensor:
        """Scores of noise whose scores in one group are x: columns of a group are orthonormal.

        Args:
            columns: of C, (rows, b).
            y: noise, (rows, samples).
            group: one-hot, (b, samples).
            x: scores that those of the group are to have, (rounds, b, samples).

        Returns:
            All scores, (rounds, b, samples).
        """
        change = tf.where(
            group & self.law.rounds.exist(), x - self._table(self._scores(columns, y)), 0.0
        )
        change = tf.reshape(change, tf.shape(y))
        return self._table(self._scores(columns, y + self._combined(columns, change)))

    def _ratios(self, x: tf.Tensor, sigma: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor, tf.Tensor]:
        """(log u, log L_j with the weight of the group, log L)."""
        log_u = x / sigma - 0.5 / sigma**2
        weighted = self.law.log_ratio(log_u) + np.log(self.law.weights())[:, None]
        return log_u, weighted, tf.reduce_logsumexp(weighted, axis=0)

    def _removed(
        self,
        columns: tf.Tensor,
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
        small = [rounds.most, 1, self.chunk]
        part = self._pattern(key, index, group, inclusion)
        u = self._uniforms(key, index, small, 2)
        multiples = tf.where(part, 1.0 + _counted(u, chosen), _counted(u, others))
        own = self._own_normals(key, index, small)
        x = self._replaced(columns, self._normals(key, index), group, own + multiples / sigma)
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
        u = self._uniforms(key, index, [rounds.most, self.chunk], 3)
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
        columns: tf.Tensor,
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
        small = [proposals.TRIES + 1, rounds.most, self.chunk]

        def chance(x: tf.Tensor) -> tf.Tensor:
            log_u = x / sigma - 0.5 / sigma**2
            return tf.exp(power * (math.log1p(-q) - log_mixed(log_u, q)))

        tries = self._own_normals(key, index, small)
        fits = self._uniforms(key, index, small, 2) < chance(tries)
        own = tries[-1]
        for trial in reversed(range(proposals.TRIES)):
            own = tf.where(fits[trial], tries[trial], own)
        group = self._group(key, index)
        x = self._replaced(columns, self._normals(key, index), group, own[:, None])
        _, _, log_ratio = self._ratios(x, sigma)
        terms = tf.where(rounds.exist(), tf.math.log(accepted * chance(x) + rest), 0.0)
        weights = np.log(law.weights())[:, None]
        log_density = tf.reduce_logsumexp(weights + tf.reduce_sum(terms, axis=0), axis=0)
        gain = -tf.math.expm1(tf.minimum(epsilons[:, None] + log_ratio, 0.0))
        return _sums(gain * tf.exp(-log_density))

    def _shifted(
        self,
        columns: tf.Tensor,
        sigma: tf.Tensor,
        epsilons: tf.Tensor,
        tilt: tf.Tensor,
        limit: tf.Tensor,
        room: tf.Tensor,
        direction: tf.Tensor,
        key: tf.Tensor,
        index: tf.Tensor,
    ) -> tf.Tensor:
        """Weighted samples of the add direction: see `proposals.Shift`."""
        y = self._normals(key, index)
        # Not 0, whose quantile is infinite.
        u = self._uniforms(key, index, [self.chunk], 2) + 2.0**-54
        s = tf.minimum(tf.math.ndtri(u * room) - tilt, limit)
        y += direction[:, None] * (s - tf.reduce_sum(direction[:, None] * y, axis=0))
        _, _, log_ratio = self._ratios(self._table(self._scores(columns, y)), sigma)
        gain = -tf.math.expm1(tf.minimum(epsilons[:, None] + log_ratio, 0.0))
        return _sums(gain * room * tf.exp(tilt * s + tilt**2 / 2.0))


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
