"""What each offset of a convolution's kernel sees, by slices."""

from __future__ import annotations

import itertools
from typing import Any

import tensorflow as tf

from keras_bandmf.clipping.shapes import dims, product


class Slices:
    """Slices of `x` (batch, *sizes, channels), one for each kernel offset.

    Args:
        layer: A convolution. Its kernel size, strides, dilation and padding are used.
        x: The side of the convolution that the kernel slides over, channels last.
        cells: The sizes of the other side, one for each spatial axis.
        groups: The number of groups of channels.
    """

    def __init__(self, layer: Any, x: tf.Tensor, cells: list[Any], groups: int = 1):
        self.strides, self.dilation = layer.strides, layer.dilation_rate
        self.groups, self.cells = groups, cells
        self.offsets = list(itertools.product(*(range(k) for k in layer.kernel_size)))
        if layer.padding != "valid":
            x = tf.pad(x, self._padding(layer, dims(x)[1:-1]))
        self.phases = self._phases(x, layer.kernel_size) if max(self.strides) > 1 else x

    def _padding(self, layer: Any, sizes: list[Any]) -> list[list[Any]]:
        pads: list[list[Any]] = [[0, 0]]
        for size, out, k, s, d in zip(
            sizes, self.cells, layer.kernel_size, self.strides, self.dilation, strict=True
        ):
            needed = (out - 1) * s + (k - 1) * d + 1 - size
            if layer.padding == "causal":
                pads.append([(k - 1) * d, 0])
                continue
            total = max(needed, 0) if isinstance(needed, int) else tf.maximum(needed, 0)
            pads.append([total // 2, total - total // 2])
        return [*pads, [0, 0]]

    def _phases(self, x: tf.Tensor, kernel_size: tuple[int, ...]) -> tf.Tensor:
        """Returns every stride-th entry: (*strides, batch, *sizes / strides, channels).

        Slices of it take no steps; TensorFlow is slow at slices that do, and there are many.
        """
        sizes, split = dims(x), []
        pads, ends = [[0, 0]], [sizes[0]]
        for size, out, k, s, d in zip(
            sizes[1:-1], self.cells, kernel_size, self.strides, self.dilation, strict=True
        ):
            cells = out + (k - 1) * d // s
            missing = cells * s - size
            missing = max(missing, 0) if isinstance(missing, int) else tf.maximum(missing, 0)
            pads.append([0, missing])
            ends.append(cells * s)
            split += [cells, s]
        x = tf.slice(tf.pad(x, [*pads, [0, 0]]), [0] * len(sizes), [*ends, sizes[-1]])
        rank = len(self.strides)
        x = tf.reshape(x, [sizes[0], *split, sizes[-1]])
        outer, inner = range(2, 2 * rank + 1, 2), range(1, 2 * rank, 2)
        return tf.transpose(x, [*outer, 0, *inner, 2 * rank + 1])

    def at(self, offset: tuple[int, ...]) -> tf.Tensor:
        """Returns inputs seen by one kernel offset: (batch, groups, positions, channels)."""
        steps = list(zip(offset, self.cells, self.strides, self.dilation, strict=True))
        phase = [k * d % s for k, _, s, d in steps] if max(self.strides) > 1 else []
        index = [slice(k * d // s, k * d // s + out) for k, out, s, d in steps]
        part = self.phases[(*phase, slice(None), *index)]
        batch, channels, positions = dims(part)[0], dims(part)[-1], product(self.cells)
        if self.groups == 1:
            return tf.reshape(part, [batch, 1, positions, channels])
        part = tf.reshape(part, [batch, positions, self.groups, channels // self.groups])
        return tf.transpose(part, [0, 2, 1, 3])
