"""The compiled TensorFlow graphs of weighted samples.

They know the law and the number of steps and bands; the columns of C are an input. So one
compilation serves all matrices that are compared. XLA would compute what several readers need once
for each of them, all random words too. So samples come from a chain of programs, each compiled on
its own, and what one of them writes is computed once. Normals, whose program takes longest to
compile, come from one that all laws share.
"""

from __future__ import annotations

import functools
import math
from typing import NamedTuple

import numpy as np
import tensorflow as tf

from keras_bandmf.accounting.amplification import proposals
from keras_bandmf.noise import normals
from keras_bandmf.sampling.patterns import (
    AllocationInGroup,
    PoissonInGroup,
    log_mixed_product,
    log_product,
)

#: Samples are drawn together whose arrays stay in the caches of a processor.
_CHUNK_VALUES = 2**18
_LEAST_CHUNK = 32


_compiled = functools.partial(tf.function, jit_compile=True, autograph=False)

#: The even and the odd ones of a row of the stream.
_Halves = tuple[tf.Tensor, tf.Tensor]
#: (log L, log of the weight) of each sample.
_Logs = tuple[tf.Tensor, tf.Tensor]


class Columns(NamedTuple):
    """The matrix, as the graphs take it.

    Attributes:
        columns: shape (rows, b): entry (i, l) is that of row i + l of column i; rows of zeros for
            places of the table that are no steps.
        owned: shape (rows, b): entry (t, j) is that of row t in the one column of group j that
            reaches it.
    """

    columns: tf.Tensor
    owned: tf.Tensor

    @classmethod
    def of(cls, columns: np.ndarray, rows: int) -> Columns:
        """Makes both tables from columns of shape (n, b), float64."""
        steps, bands = columns.shape
        padded = np.zeros((rows, bands))
        padded[:steps] = columns
        row, group = np.arange(rows)[:, None], np.arange(bands)
        lag = (row - group) % bands
        owned = np.where(row >= lag, padded[np.maximum(row - lag, 0), lag], 0.0)
        return cls(tf.constant(padded), tf.constant(owned))


class Programs:
    """The graphs of one law. Tables of steps have shape (rounds, b, samples).

    Each of `remove`, `dip` and `shift` takes the `Columns`, sigma and its proposal, whose numbers
    are tensors, and at last a key and the number of the chunk of samples. It returns log L and the
    log of the weight of each sample, without what depends on epsilon: shape (samples,).

    Args:
        law: the law.
    """

    def __init__(self, law: PoissonInGroup | AllocationInGroup):
        self.law = law
        self._rows = law.rounds.most * law.rounds.num_bands
        self.chunk = max(_LEAST_CHUNK, _CHUNK_VALUES // self._rows // 16 * 16)
        self._table_shape = [law.rounds.most, self.chunk]
        self._tries_shape = [proposals.TRIES, *self._table_shape]
        chained = functools.partial(tf.function, autograph=False)
        self._remove, self._dip, self._shift = map(
            chained, (self._removed, self._dipped, self._all_shifted)
        )
        self._scores = _compiled(self._all_scores)
        self._moved = _compiled(self._moved_noise)
        self._own_scores = _compiled(self._scores_of_group)
        self._multiples = _compiled(self._drawn_multiples)
        self._accepted = _compiled(self._accepted_change)
        self._shifted = _compiled(self._shifted_noise)
        self._remove_logs = _compiled(self._logs_of_remove)
        self._dip_logs = _compiled(self._logs_of_dip)
        self._shift_logs = _compiled(self._logs_of_shift)

    def _normals(self, key: tf.Tensor, index: tf.Tensor) -> _Halves:
        """The noise of a chunk of samples, for `_reshaped`."""
        return _normals_of(key, 2 * index, [self._rows, self.chunk])

    def _uniforms(self, key: tf.Tensor, index: tf.Tensor, shape: list[int], use: int) -> tf.Tensor:
        seed = tf.stack([key[0] ^ tf.cast(use, tf.int64), key[1] + index])
        return tf.random.stateless_uniform(shape, seed, dtype=tf.float64, alg="philox")

    def _group(self, u: tf.Tensor) -> tf.Tensor:
        """The group of each sample, shape (samples,), int32, from numbers uniform in [0, 1)."""
        ends = np.cumsum(self.law.weights())[:-1]
        return tf.reduce_sum(tf.cast(u >= ends[:, None], tf.int32), axis=0)

    def _all_scores(self, columns: tf.Tensor, y: tf.Tensor) -> tf.Tensor:
        """C' y: shape (rounds, b, samples)."""
        bands, rows = self.law.rounds.num_bands, self._rows
        y = tf.pad(y, [[0, bands - 1], [0, 0]])
        scores = tf.add_n([columns[:, lag, None] * y[lag : lag + rows] for lag in range(bands)])
        return self._table(scores)

    def _table(self, x: tf.Tensor) -> tf.Tensor:
        rounds = self.law.rounds
        return tf.reshape(x, [rounds.most, rounds.num_bands, self.chunk])

    def _begun(self, group: tf.Tensor) -> tf.Tensor:
        """Whether a place among b steps is in the same round of the group, else in the one before.

        Shape (b, samples), bool.
        """
        return tf.range(self.law.rounds.num_bands)[:, None] >= group

    def _scores_of_group(
        self, owned: tf.Tensor, y: tf.Tensor, of_group: tf.Tensor
    ) -> tuple[tf.Tensor, tf.Tensor]:
        """(the groups, the scores of the own group of each sample, shape (rounds, samples))."""
        group = self._group(of_group)
        parts = self._table(y * tf.gather(owned, group, axis=1))
        begun = self._begun(group)
        here = tf.reduce_sum(tf.where(begun, parts, 0.0), axis=1)
        next_ = tf.reduce_sum(tf.where(~begun, parts, 0.0), axis=1)
        return group, here + tf.pad(next_[1:], [[0, 1], [0, 0]])

    def _moved_noise(
        self, owned: tf.Tensor, y: tf.Tensor, group: tf.Tensor, change: tf.Tensor
    ) -> tf.Tensor:
        """Noise plus the columns of the own group of each sample times a change.

        Columns of a group are orthonormal: its scores move by `change`, of shape
        (rounds + 1, samples), of which the first row is zero; what the noise is orthogonal to them
        stays.
        """
        moves = tf.where(self._begun(group), change[1:, None], change[:-1, None])
        return y + tf.gather(owned, group, axis=1) * tf.reshape(moves, tf.shape(y))

    def _ratios(self, x: tf.Tensor, sigma: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor, tf.Tensor]:
        """(log u, log L_j, log L)."""
        log_u = x / sigma - 0.5 / sigma**2
        each = self.law.log_ratio(log_u)
        return log_u, each, tf.reduce_logsumexp(each + self._log_weights(), axis=0)

    def _log_weights(self) -> np.ndarray:
        return np.log(self.law.weights())[:, None]

    def remove(
        self,
        matrix: Columns,
        sigma: tf.Tensor,
        tilt: proposals.Tilt,
        key: tf.Tensor,
        index: tf.Tensor,
    ) -> _Logs:
        """Weighted samples of the remove direction, of a `proposals.Tilt` of tensors."""
        return self._remove(self._normals(key, index), matrix, sigma, tilt, key, index)

    def _removed(
        self,
        halves: _Halves,
        matrix: Columns,
        sigma: tf.Tensor,
        tilt: proposals.Tilt,
        key: tf.Tensor,
        index: tf.Tensor,
    ) -> _Logs:
        group, multiples = self._multiples(
            tilt,
            sigma,
            self._uniforms(key, index, [self.chunk], 1),
            self._uniforms(key, index, self._table_shape, 2),
            self._uniforms(key, index, self._table_shape, 3),
        )
        y = _reshaped(halves, [self._rows, self.chunk])
        y = self._moved(matrix.owned, y, group, multiples)
        x = self._scores(matrix.columns, y)
        log_ratio, log_density = self._remove_logs(x, sigma, tilt)
        return log_ratio, log_ratio - log_density

    def _drawn_multiples(
        self,
        tilt: proposals.Tilt,
        sigma: tf.Tensor,
        of_group: tf.Tensor,
        of_multiples: tf.Tensor,
        of_pattern: tf.Tensor,
    ) -> tuple[tf.Tensor, tf.Tensor]:
        """(the groups, by how much each of their scores is shifted, after a row of zeros)."""
        group = self._group(of_group)
        part = self._pattern(of_pattern, group, tilt.inclusion)
        u = of_multiples
        multiples = tf.where(part, 1.0 + _counted(u, tilt.chosen), _counted(u, tilt.others))
        return group, tf.pad(multiples / sigma, [[1, 0], [0, 0]])

    def _pattern(self, u: tf.Tensor, group: tf.Tensor, inclusion: tf.Tensor) -> tf.Tensor:
        """Which rounds of its group a sample takes part in: (rounds, samples), bool."""
        rounds = self.law.rounds
        if isinstance(self.law, PoissonInGroup):
            return u < inclusion
        count = tf.gather(tf.constant(rounds.of_group(), tf.int32), group)
        u = tf.where(tf.range(rounds.most, dtype=tf.int32)[:, None] < count, u, 2.0)
        return u <= tf.sort(u, axis=0)[self.law.participations - 1]

    def _logs_of_remove(
        self, x: tf.Tensor, sigma: tf.Tensor, tilt: proposals.Tilt
    ) -> tuple[tf.Tensor, tf.Tensor]:
        """(log L, log of the density of the proposal)."""
        log_u, each, log_ratio = self._ratios(x, sigma)
        log_h = each
        if not isinstance(self.law, PoissonInGroup):  # whose tilt has the q of the law
            log_h = log_mixed_product(log_u, tilt.probability, self.law.rounds)
        log_density = each + self._log_weights() + tilt.power * log_h - tilt.log_norms[:, None]
        return log_ratio, tf.reduce_logsumexp(log_density, axis=0)

    def dip(
        self,
        matrix: Columns,
        sigma: tf.Tensor,
        dip: proposals.Dip,
        key: tf.Tensor,
        index: tf.Tensor,
    ) -> _Logs:
        """Weighted samples of the add direction, of a `proposals.Dip` of tensors.

        The own scores of the noise are the first of the tries.
        """
        tries = _normals_of(key, 2 * index + 1, self._tries_shape)
        return self._dip(self._normals(key, index), tries, matrix, sigma, dip, key, index)

    def _dipped(
        self,
        halves: _Halves,
        tries: _Halves,
        matrix: Columns,
        sigma: tf.Tensor,
        dip: proposals.Dip,
        key: tf.Tensor,
        index: tf.Tensor,
    ) -> _Logs:
        y = _reshaped(halves, [self._rows, self.chunk])
        others = _reshaped(tries, self._tries_shape)
        group, own = self._own_scores(matrix.owned, y, self._uniforms(key, index, [self.chunk], 1))
        uniforms = self._uniforms(key, index, self._tries_shape, 2)
        change = self._accepted(sigma, dip.power, own, others, uniforms)
        x = self._scores(matrix.columns, self._moved(matrix.owned, y, group, change))
        log_ratio, log_density = self._dip_logs(x, sigma, dip)
        return log_ratio, -log_density

    def _accepted_change(
        self,
        sigma: tf.Tensor,
        power: tf.Tensor,
        own: tf.Tensor,
        others: tf.Tensor,
        uniforms: tf.Tensor,
    ) -> tf.Tensor:
        """By how much the scores of the own groups change, after a row of zeros."""
        tries = tf.concat([own[None], others], axis=0)
        fits = uniforms < tf.exp(self._log_chance(tries[:-1], sigma, power))
        taken = tries[-1]
        for trial in reversed(range(proposals.TRIES)):
            taken = tf.where(fits[trial], tries[trial], taken)
        return tf.pad(taken - own, [[1, 0], [0, 0]])

    def _log_chance(self, x: tf.Tensor, sigma: tf.Tensor, power: tf.Tensor) -> tf.Tensor:
        """Log of the probability that a score is accepted, ((1 - q) / (1 - q + q u))^power."""
        if not isinstance(self.law, PoissonInGroup):
            raise TypeError(f"A dip is for Poisson sampling. Received: law={self.law}.")
        log_odds = x / sigma - 0.5 / sigma**2 + self.law.log_odds
        return -power * (tf.maximum(log_odds, 0.0) + tf.math.log1p(tf.exp(-tf.abs(log_odds))))

    def _logs_of_dip(
        self, x: tf.Tensor, sigma: tf.Tensor, dip: proposals.Dip
    ) -> tuple[tf.Tensor, tf.Tensor]:
        """(log L, log of the density of the proposal)."""
        _, _, log_ratio = self._ratios(x, sigma)
        terms = dip.accepted * tf.exp(self._log_chance(x, sigma, dip.power)) + dip.rest
        # Between `rest` and TRIES + 1. What is too small for float64 counts as 0, which makes
        # weights larger.
        log_each = log_product(tf.where(self.law.rounds.exist(), terms, 1.0), 64)
        return log_ratio, tf.reduce_logsumexp(log_each + self._log_weights(), axis=0)

    def shift(
        self,
        matrix: Columns,
        sigma: tf.Tensor,
        shift: proposals.Shift,
        direction: tf.Tensor,
        key: tf.Tensor,
        index: tf.Tensor,
    ) -> _Logs:
        """Weighted samples of the add direction, of a `proposals.Shift` of tensors."""
        return self._shift(self._normals(key, index), matrix, sigma, shift, direction, key, index)

    def _all_shifted(
        self,
        halves: _Halves,
        matrix: Columns,
        sigma: tf.Tensor,
        shift: proposals.Shift,
        direction: tf.Tensor,
        key: tf.Tensor,
        index: tf.Tensor,
    ) -> _Logs:
        y = _reshaped(halves, [self._rows, self.chunk])
        u = self._uniforms(key, index, [self.chunk], 2)
        y, log_weight = self._shifted(y, u, shift, direction)
        return self._shift_logs(self._scores(matrix.columns, y), sigma), log_weight

    def _shifted_noise(
        self, y: tf.Tensor, u: tf.Tensor, shift: proposals.Shift, direction: tf.Tensor
    ) -> tuple[tf.Tensor, tf.Tensor]:
        """(the noise with another component along the direction, log of its weight)."""
        tilt, limit, room = shift
        # Not 0, whose quantile is infinite.
        s = tf.minimum(tf.math.ndtri((u + 2.0**-54) * room) - tilt, limit)
        # A sample that is lost must not count as 0.
        s = tf.where(tf.math.is_finite(s), s, np.nan)
        y += direction[:, None] * (s - tf.reduce_sum(direction[:, None] * y, axis=0))
        return y, tf.math.log(room) + tilt * s + tilt**2 / 2.0

    def _logs_of_shift(self, x: tf.Tensor, sigma: tf.Tensor) -> tf.Tensor:
        return self._ratios(x, sigma)[2]


@_compiled
def _standard_normals(key: tf.Tensor, step: tf.Tensor, chunks: int) -> _Halves:
    return normals.standard_normals(key, step, 0, chunks, normals.FINE)


def _normals_of(key: tf.Tensor, step: tf.Tensor, shape: list[int]) -> _Halves:
    """Row `step` of the stream, at least as many as a shape holds.

    As many as most laws need are always drawn, so that there is a program for one number.
    """
    count = max(math.prod(shape), _CHUNK_VALUES)
    return _standard_normals(key, step, -(-count // normals.CHUNK))


def _reshaped(halves: _Halves, shape: list[int]) -> tf.Tensor:
    return tf.reshape(tf.concat(halves, axis=0)[: math.prod(shape)], shape)


def _counted(u: tf.Tensor, ends: tf.Tensor) -> tf.Tensor:
    """How many of the cumulated probabilities are at most u, float64."""
    return tf.add_n([tf.cast(u >= ends[i], tf.float64) for i in range(ends.shape[0] - 1)])
