"""Correlated noise without memory: the independent rows that a row consists of are drawn again."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import numpy as np
import tensorflow as tf

from keras_bandmf import _distribution
from keras_bandmf.noise import normals
from keras_bandmf.noise.correlated import CorrelatedNoise, packed
from keras_bandmf.noise.lattice import NoiseRows
from keras_bandmf.noise.taps import TAP_BITS, NoiseTaps, checked_taps

#: Chunks that are drawn at a time: the sums of so many fit in the cache of a processor. A GPU is
#: filled by many more, and has each block and each pass launched by the processor.
_BLOCK, _GPU_BLOCK = 128, 8192
#: Taps of one pass over a block. With 16 of them in one program, XLA is five times as slow.
_UNROLLED = 2


class RegeneratedNoise(CorrelatedNoise):
    """A stream of rows `sum_k d_k z_(i-k)` of `C^-1 Z`, where C^-1 has p taps d.

    Every row of Z is a function of a key and its step, so the last p rows are drawn again in each
    step, and none is kept: the memory is that of independent noise, the time that of p draws. The
    state is one key a step, of 16 bytes. Otherwise it is used as `CorrelatedNoise` is.

    Formal guarantees:
        *Lattice.* Rows of Z are rounded to whole numbers of a lattice 2^16 times finer than that of
        the released rows, and added up in float64 as whole numbers. What is released is the sum
        `G_i + n_i` of whole numbers, as in `CorrelatedNoise`, and a post-processing of
        `G + C^-1 Z` on the finer lattice: n_i is rounded half up, which commutes with whole
        numbers, and n does not depend on the data. What rounding adds to the sensitivity is in
        `lattice.charged_norm`, and its proof in `taps.rounding_steps`. A row that another program
        or device draws again, with another rounding of float64, is part of that.
        *Tail* and *normals* are as in `CorrelatedNoise`: z has the same bits, and given all earlier
        rows a released value is a cell of the same width. There is no `exact`.
        *Once* is as in `CorrelatedNoise`. The key of a step is a one-way fold of the noise key. A
        checkpoint has those of the last p - 1 steps, from which these rows of Z follow, and no
        other ones unless it has the noise key for a replay. A row that is computed twice within a
        step is taken to have the same bits, as was seen in every program that was tried.

    Args:
        strategy: The strategy, whose `noise_taps` define `C^-1`.
        stddev: The standard deviation of `Z`: noise multiplier times sensitivity times clip norm.
        shapes: The shapes of the gradients.
        seed: An integer, for tests only. By default the key comes from the operating system.

    Raises:
        ValueError: If an argument is out of range, a replica would draw 2**31 values or more, or
            flags of XLA make its arithmetic too loose.

    Example:
        >>> import keras_bandmf as bandmf
        >>> strategy = bandmf.strategies.BandedInverseStrategy([1.0, -0.5, -0.1], num_steps=4)
        >>> noise = bandmf.noise.RegeneratedNoise(strategy, stddev=1.0, shapes=[(2, 3), (3,)])
        >>> [tuple(part.shape) for part in noise.next()]
        [(2, 3), (3,)]
        >>> noise.position, noise.state_bytes
        (1, 0)
    """

    def __init__(
        self,
        strategy: NoiseTaps,
        stddev: float,
        shapes: Sequence[Sequence[int]],
        seed: int | None = None,
    ):
        self._taps = checked_taps(strategy)
        super().__init__(cast(Any, strategy), stddev, shapes, seed)

    def _count_slots(self) -> int:
        return len(self._taps) - 1

    def _make_variables(self) -> None:
        self._key = tf.Variable(np.zeros(2, np.int64), trainable=False, name="noise_key")
        keys = np.zeros((self.num_steps, 2), np.int64)
        self._step_keys = tf.Variable(keys, trainable=False, name="noise_step_keys")
        self._ring = None
        self._position = _distribution.own_variable(tf.zeros([], tf.int64), "noise_position")

    @property
    def state_bytes(self) -> int:
        """The size of earlier rows on each replica, in bytes: 0."""
        return 0

    def set_key(self, key: np.ndarray) -> None:
        """Replaces the key of all rows of Z from the position on. Earlier ones keep theirs.

        Args:
            key: The key, of shape (2,), uint64. With several worker processes, that of the chief is
                taken.
        """
        super().set_key(key)
        key, keys = self.get_key(), self._step_keys.numpy()
        for step in range(self.position, self.num_steps):
            keys[step] = normals.fold_key(key, f"step {step}").view(np.int64)
        self._step_keys.assign(keys)

    def get_ring(self) -> np.ndarray:
        """Returns the secret keys of the last p - 1 rows of Z, from which they can be drawn.

        Returns:
            The keys of steps `position` - p + 1 to `position` - 1, zero before step 0, of shape
            (p - 1, 4), int32.
        """
        last = self.position + np.arange(-self.num_slots, 0)
        keys = np.where(last[:, None] >= 0, self._step_keys.numpy()[np.maximum(last, 0)], 0)
        return np.ascontiguousarray(keys).view(np.int32).reshape(self.num_slots, 4)

    def set_ring(self, ring: np.ndarray, position: int | None = None) -> None:
        """Restores what `get_ring` returned, on any number of replicas.

        Args:
            ring: The keys of the p - 1 steps before `position`, of shape (p - 1, 4), int32.
            position: The number of the next row; None leaves it as it is.

        Raises:
            ValueError: If the shape or dtype differs.
        """
        ring = np.asarray(ring)
        expected = (self.num_slots, 4)
        if ring.shape != expected or ring.dtype != np.int32:
            raise ValueError(
                f"The saved noise ring must be int32 of shape {expected}: the keys of rows that "
                f"are drawn again. Received: an array of dtype {ring.dtype} and shape "
                f"{ring.shape}. It belongs to another plan, or the file is damaged. The run cannot "
                "continue from it."
            )
        if position is not None:
            self.position = position
        last = self.position + np.arange(-self.num_slots, 0)
        keys = self._step_keys.numpy()
        keys[last[last >= 0]] = np.ascontiguousarray(ring).view(np.int64)[last >= 0]
        self._step_keys.assign(_distribution.from_chief(self._distribution, keys))

    def _draw_and_pass(self, step: tf.Tensor, replica: int) -> tf.Tensor:
        """Returns a replica's part of row `step`, two int32 in each int64, in one XLA program.

        It is drawn in blocks, so that no more than one row, and of rows of Z no more than a block,
        is ever in memory; the last block may be longer than the part.
        """
        chunks = self.layout.chunks_per_shard
        blocks = -(-chunks // largest_block(self._local(self._position)[0].device))
        block = -(-chunks // blocks)
        first = self.layout.first_chunk(replica)
        taps = self._taps_of(step)
        keys = self._step_keys.read_value()

        def one_more(number: tf.Tensor, row: tf.TensorArray) -> tuple[tf.Tensor, tf.TensorArray]:
            start = first + tf.cast(number, tf.int64) * block
            return number + 1, row.write(number, self._block_of(step, start, block, taps, keys))

        row = tf.TensorArray(
            tf.int64, size=blocks, element_shape=[block * normals.COUNTERS_PER_CHUNK]
        )
        _, row = tf.while_loop(lambda number, _: number < blocks, one_more, (0, row))
        return tf.reshape(row.stack(), [-1])

    def _taps_of(self, step: tf.Tensor) -> tf.Tensor:
        """Returns the taps of row `step`, in units of the first, and zero before step 0."""
        taps = np.zeros(1 + -(-self.num_slots // _UNROLLED) * _UNROLLED)
        taps[: len(self._taps)] = self._taps / self._taps[0]
        lags = tf.range(len(taps), dtype=tf.int64)
        return tf.where(lags <= step, tf.constant(taps, tf.float64), 0.0)

    def _block_of(
        self, step: tf.Tensor, start: tf.Tensor, block: int, taps: tf.Tensor, keys: tf.Tensor
    ) -> tf.Tensor:
        """Returns the chunks of row `step` from `start` on, packed."""
        zeros = tf.zeros(block * normals.COUNTERS_PER_CHUNK, tf.float64)

        def add(lag: tf.Tensor, low: tf.Tensor, high: tf.Tensor) -> tuple[tf.Tensor, ...]:
            for more in range(_UNROLLED):
                tap = tf.gather(taps, lag + more)
                pair = self._whole_pair(step - lag - more, start, block, keys)
                low, high = low + tap * pair[0], high + tap * pair[1]
            return lag + _UNROLLED, low, high

        sums: Sequence[tf.Tensor] = (zeros, zeros)
        if self.num_slots:
            lag = tf.constant(1, tf.int64)
            _, *sums = tf.while_loop(
                lambda lag, *_: lag <= self.num_slots, add, (lag, zeros, zeros)
            )
        own = self._whole_pair(step, start, block, keys)
        # Half up: half to even would not commute with the whole sums of gradients.
        return packed(
            *(
                tf.floor((z + tf.round(past)) * 2.0**-TAP_BITS + 0.5)
                for z, past in zip(own, sums, strict=True)
            )
        )

    def _whole_pair(
        self, step: tf.Tensor, start: tf.Tensor, block: int, keys: tf.Tensor
    ) -> list[tf.Tensor]:
        """Returns a part of row `step` of Z, in whole numbers of the finer lattice."""
        key = tf.gather(keys, tf.clip_by_value(step, 0, self.num_steps - 1))
        scale = self._taps[0] * self.stddev / self.step * 2.0**TAP_BITS
        return [tf.round(z * scale) for z in normals.standard_normals(key, step, start, block)]


def largest_block(device: str) -> int:
    """Returns the most chunks to draw at a time. They change the time, and no bit of the noise.

    Args:
        device: The name of the device that draws.
    """
    return _GPU_BLOCK if ":GPU:" in device.upper() else _BLOCK


def noise_of(
    strategy: NoiseRows | NoiseTaps,
    stddev: float,
    shapes: Sequence[Sequence[int]],
    exact: bool = False,
) -> CorrelatedNoise:
    """Makes the noise of a strategy: with a ring, or drawn again.

    Args:
        strategy: The strategy, which defines `C`.
        stddev: The standard deviation of `Z`.
        shapes: The shapes of the gradients.
        exact: Whether to round each value of the noise as a real number is rounded.

    Raises:
        ValueError: If `exact` noise is asked for where it does not exist.
    """
    if not isinstance(strategy, NoiseTaps):
        return CorrelatedNoise(strategy, stddev, shapes, exact=exact)
    if exact:
        refuse_exact(strategy)
    return RegeneratedNoise(strategy, stddev, shapes)


def refuse_exact(strategy: Any) -> None:
    """Refuses exact noise of a strategy whose noise is drawn again.

    Args:
        strategy: A strategy.

    Raises:
        ValueError: If it has taps.
    """
    if isinstance(strategy, NoiseTaps):
        raise ValueError(
            'noise="exact" rounds each value once, but rows that are drawn again are sums of '
            f"several. Received: noise='exact', strategy={strategy!r}. Use noise='default', or a "
            "banded strategy."
        )
