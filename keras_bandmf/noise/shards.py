"""The layout of the flat gradient vector: which replica owns which part of it."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import tensorflow as tf

from keras_bandmf._checks import checked_int
from keras_bandmf.noise.normals import CHUNK


class ShardLayout:
    """The flat vector of all gradients, cut into one run of whole chunks for each replica.

    The variables lie in the flat vector one after the other, and the vector is padded with zeros to
    `num_shards * shard_size`. The part of replica r is `[r * shard_size, (r + 1) * shard_size)`.

    Args:
        shapes: The shapes of the gradients, fully defined.
        num_shards: The number of replicas.
    """

    def __init__(self, shapes: Sequence[Sequence[int]], num_shards: int = 1):
        try:
            self.shapes = [tuple(checked_int("side", side, 0) for side in each) for each in shapes]
        except (TypeError, ValueError) as error:
            raise TypeError(
                "Expected `shapes` to be a list of shapes, tuples of integers. Received: "
                f"shapes={shapes!r}."
            ) from error
        sizes = [math.prod(shape) for shape in self.shapes]
        self.offsets = [0, *np.cumsum(sizes).tolist()]
        self.size = self.offsets[-1]
        self.num_shards = num_shards
        self.chunks_per_shard = max(1, -(-self.size // (CHUNK * num_shards)))
        self.shard_size = self.chunks_per_shard * CHUNK

    def first_chunk(self, shard: int) -> int:
        """Returns the chunk of the flat vector at which a shard starts."""
        return shard * self.chunks_per_shard

    def split(self, flat: tf.Tensor, shard: int) -> list[tf.Tensor | None]:
        """Cuts a shard of the flat vector into the shapes of the gradients.

        Args:
            flat: The part of replica `shard`, of shape (shard_size,).
            shard: The number of the replica.

        Returns:
            A tensor for each shape, which is zero outside the shard; None where the shard has no
            part of the gradient.
        """
        start = shard * self.shard_size
        parts: list[tf.Tensor | None] = []
        for shape, begin, end in zip(self.shapes, self.offsets[:-1], self.offsets[1:], strict=True):
            low, high = max(begin, start), min(end, start + self.shard_size)
            if low >= high:
                parts.append(None)
                continue
            part = flat[low - start : high - start]
            if high - low < end - begin:
                part = tf.pad(part, [[low - begin, end - high]])
            parts.append(tf.reshape(part, shape))
        return parts

    def gather(self, shards: Sequence[np.ndarray]) -> np.ndarray:
        """Joins the shards of k flat vectors.

        Args:
            shards: An array of shape (k, shard_size) for each replica.

        Returns:
            An array of shape (k, size), whose layout does not depend on the number of replicas.
        """
        return np.concatenate(list(shards), axis=1)[:, : self.size]

    def scatter(self, whole: np.ndarray) -> list[np.ndarray]:
        """Cuts k flat vectors into shards, for this number of replicas.

        Args:
            whole: An array of shape (k, size), as `gather` returns it.

        Returns:
            An array of shape (k, shard_size) for each replica, padded with zeros.
        """
        padding = self.num_shards * self.shard_size - self.size
        padded = np.pad(whole, [(0, 0), (0, padding)])
        return np.split(padded, self.num_shards, axis=1)
