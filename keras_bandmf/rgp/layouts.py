"""Says which kernel of a layer can have carriers, and how it is a matrix."""

from __future__ import annotations

import dataclasses
import math
from typing import NamedTuple

import keras
import tensorflow as tf

from keras_bandmf._keras_internals import kernel_of, table_of


@dataclasses.dataclass(frozen=True)
class MatrixLayout:
    """A kernel as a matrix W (m, n): some axes make its rows, the others its columns.

    Attributes:
        shape: The shape of the kernel.
        rows: The axes that are summed over with the layer's inputs, in their order.
        columns: The other axes, in their order.
    """

    shape: tuple[int, ...]
    rows: tuple[int, ...]
    columns: tuple[int, ...]

    @property
    def row_shape(self) -> tuple[int, ...]:
        """Sizes of the axes in `rows`."""
        return tuple(self.shape[axis] for axis in self.rows)

    @property
    def column_shape(self) -> tuple[int, ...]:
        """Sizes of the axes in `columns`."""
        return tuple(self.shape[axis] for axis in self.columns)

    @property
    def sides(self) -> tuple[int, int]:
        """The numbers of rows and columns, m and n."""
        return math.prod(self.row_shape), math.prod(self.column_shape)

    def matrix(self, kernel: tf.Tensor) -> tf.Tensor:
        """Returns the kernel as (m, n)."""
        return tf.reshape(tf.transpose(kernel, self.rows + self.columns), self.sides)

    def kernel(self, matrix: tf.Tensor) -> tf.Tensor:
        """Returns the kernel that `matrix` turned into (m, n)."""
        order = self.rows + self.columns
        split = tf.reshape(matrix, [self.shape[axis] for axis in order])
        return tf.transpose(split, [order.index(axis) for axis in range(len(order))])


@dataclasses.dataclass(frozen=True)
class EinsumLabels:
    """Labels of an einsum "inputs,kernel->outputs" whose kernel is a matrix.

    Attributes:
        inputs: The first term, "..." included.
        kernel: The second term.
        outputs: The term after the arrow, "..." included.
        contracted: The labels of the kernel that are summed over, in its order.
        produced: The other labels of the kernel, in its order.
        rank: A label that occurs nowhere else.
    """

    inputs: str
    kernel: str
    outputs: str
    contracted: str
    produced: str
    rank: str

    @property
    def through(self) -> str:
        """Outputs of the left carrier: the rank in place of what the kernel produces."""
        kept = "".join(label for label in self.outputs if label not in self.produced)
        return kept + self.rank


def einsum_labels(equation: str) -> EinsumLabels | None:
    """Reads an equation; None if the kernel is not one matrix for all positions."""
    left, outputs = equation.replace(" ", "").split("->")
    inputs, kernel = left.split(",")
    contracted = "".join(c for c in kernel if c in inputs and c not in outputs)
    produced = "".join(c for c in kernel if c in outputs and c not in inputs)
    if len(contracted + produced) != len(kernel) or not contracted or not produced:
        return None
    used = set(equation)
    rank = next(c for c in map(chr, range(ord("A"), ord("Z") + 1)) if c not in used)
    return EinsumLabels(inputs, kernel, outputs, contracted, produced, rank)


class CarriedKernel(NamedTuple):
    """A kernel that can have carriers.

    Attributes:
        variable: The kernel.
        layout: How it is a matrix.
    """

    variable: keras.Variable
    layout: MatrixLayout


def carried_kernel(layer: keras.layers.Layer) -> CarriedKernel | str:
    """Returns the kernel of a layer that can have carriers.

    Args:
        layer: A built layer.

    Returns:
        The kernel, or the reason why there is none.
    """
    kind = kind_of(layer)
    if kind is None:
        return f"{type(layer).__name__} has no kernel that can have carriers"
    if getattr(layer, "lora_enabled", False):
        return "LoRA is enabled"
    if getattr(layer, "quantization_mode", None) is not None:
        return "the layer is quantized"
    if not layer.built:
        return "the layer is not built"
    if kind is keras.layers.Embedding:
        shape = tuple(table_of(layer).shape)
        return CarriedKernel(table_of(layer), MatrixLayout(shape, (0,), (1,)))
    shape = tuple(kernel_of(layer).shape)
    if kind is keras.layers.EinsumDense:
        labels = einsum_labels(layer.equation)
        if labels is None:
            return "the equation has a kernel that is not one matrix for all positions"
        rows = tuple(labels.kernel.index(c) for c in labels.contracted)
        columns = tuple(labels.kernel.index(c) for c in labels.produced)
        return CarriedKernel(kernel_of(layer), MatrixLayout(shape, rows, columns))
    if kind is keras.layers.Conv2D and layer.groups != 1:
        return "a grouped convolution has a matrix for each group"
    last = len(shape) - 1
    return CarriedKernel(kernel_of(layer), MatrixLayout(shape, tuple(range(last)), (last,)))


#: Layer types with carriers; a thin layer of this package is a subclass of one of them.
KINDS = (
    keras.layers.Dense,
    keras.layers.EinsumDense,
    keras.layers.Embedding,
    keras.layers.Conv2D,
)


def kind_of(layer: keras.layers.Layer) -> type | None:
    """Returns the Keras layer type whose computation this layer does, or None.

    A subclass from elsewhere may compute something else: only exact types and the thin layers of
    this package, which change nothing but their config, are known.
    """
    known = type(layer)
    if getattr(known, "carries_gradients", False):
        known = next(base for base in known.__mro__ if base in KINDS)
    return known if known in KINDS else None
