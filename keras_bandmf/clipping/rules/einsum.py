"""Clipping rule of EinsumDense, LoRA included."""

from __future__ import annotations

import keras
import tensorflow as tf

from keras_bandmf.clipping.factors import Factor, Layout, Outer, Unsupported
from keras_bandmf.clipping.rules.base import (
    ProductRule,
    lora_scale,
    wide,
)
from keras_bandmf.clipping.shapes import dims, product


class EinsumDenseRule(ProductRule):
    """EinsumDense with any equation whose batch label stays in front and out of the kernel.

    Args:
        equation: None for that of the layer; else the one to compute by in its place, for
            `linear` and `kernel_factor` alone.
    """

    def __init__(self, equation: str | None = None):
        self._equation = equation

    def refuses(self, layer: keras.layers.Layer) -> str | None:
        """Returns a reason for an equation whose kernel gradient is not by example."""
        reason = super().refuses(layer)
        if reason is None and "." not in layer.equation:
            reason = _Equation.of(layer.equation, None).refuses(layer.lora_enabled)
        return reason

    def linear(self, layer: keras.layers.Layer, inputs: tf.Tensor, kernel: tf.Tensor) -> tf.Tensor:
        """Returns the einsum of the inputs with a kernel."""
        return keras.ops.einsum(self._equation or layer.equation, inputs, kernel)

    def kernel_factor(
        self, layer: keras.layers.Layer, inputs: tf.Tensor, g: tf.Tensor, shape: tuple[int, ...]
    ) -> Factor:
        """Returns the kernel's gradients as products of arranged inputs and output gradients."""
        x = tf.cast(inputs, g.dtype)
        equation = _known_equation(layer, self._equation or layer.equation, x, lora=False)
        return equation.factor(x, g, shape)

    def lora_factors(
        self, layer: keras.layers.Layer, x: tf.Tensor, g: tf.Tensor
    ) -> list[tuple[keras.Variable, Factor]]:
        """Returns the gradients of LoRA's two factors, by the layer's own equation."""
        equation = _known_equation(layer, layer.equation, x, lora=True)
        return _lora(layer, equation, x, lora_scale(layer) * g)


def _known_equation(
    layer: keras.layers.Layer, equation: str, x: tf.Tensor, lora: bool
) -> _Equation:
    """Returns an equation for inputs of the rank of `x`.

    Raises:
        Unsupported: If it cannot be handled, which an ellipsis hides until the rank is known.
    """
    found = _Equation.of(equation, x.shape.rank)
    reason = found.refuses(lora)
    if reason is not None:
        raise Unsupported(f"{layer.path}: {reason}")
    return found


def _lora(
    layer: keras.layers.Layer, equation: _Equation, x: tf.Tensor, g: tf.Tensor
) -> list[tuple[keras.Variable, Factor]]:
    """Returns factors of A and B in the kernel A B, by two equations with the rank between."""
    first, second = layer.lora_kernel_a, layer.lora_kernel_b
    if equation.kernel[-1] in equation.contracted:
        first, second = second, first
    inner, outer = equation.split()
    middle = tf.einsum(inner.text(), x, wide(first, g))
    g_middle = tf.einsum(f"{outer.outputs},{outer.kernel}->{outer.inputs}", g, wide(second, g))
    return [
        (first, inner.factor(x, g_middle, tuple(first.shape))),
        (second, outer.factor(middle, g, tuple(second.shape))),
    ]


class _Equation:
    """Labels of an einsum "inputs,kernel->outputs", sorted by where they occur."""

    def __init__(self, inputs: str, kernel: str, outputs: str):
        self.inputs, self.kernel, self.outputs = inputs, kernel, outputs
        ins, outs = set(inputs), set(outputs)
        self.groups = "".join(c for c in kernel if c in ins and c in outs)
        self.contracted = "".join(c for c in kernel if c in ins and c not in outs)
        self.produced = "".join(c for c in kernel if c in outs and c not in ins)
        self.positions = "".join(c for c in self.inputs[1:] if c in outs and c not in kernel)

    @classmethod
    def of(cls, equation: str, rank: int | None) -> _Equation:
        """Returns the equation of Keras's text; an ellipsis is written out for inputs of `rank`."""
        left, outputs = equation.replace(" ", "").split("->")
        inputs, kernel = left.split(",")
        if "..." in equation:
            if rank is None:
                raise ValueError(f"An ellipsis needs the rank. Received: equation={equation!r}")
            fresh = "".join(_unused(equation)[: rank - len(inputs.replace("...", ""))])
            inputs, outputs = inputs.replace("...", fresh), outputs.replace("...", fresh)
        return cls(inputs, kernel, outputs)

    def text(self) -> str:
        """Returns the equation as `tf.einsum` takes it."""
        return f"{self.inputs},{self.kernel}->{self.outputs}"

    def split(self) -> tuple[_Equation, _Equation]:
        """Returns, for a kernel A B, the equation applied first and the one for its outputs."""
        last = self.kernel[-1]
        rank = _unused(self.text())[0]
        if last in self.produced:  # A, then B
            middle = self.outputs.replace(last, rank)
            parts = [self.kernel[:-1] + rank, rank + last]
        else:  # B, then A
            middle = self.inputs.replace(last, rank)
            parts = [rank + last, self.kernel[:-1] + rank]
        return _Equation(self.inputs, parts[0], middle), _Equation(middle, parts[1], self.outputs)

    def refuses(self, lora: bool) -> str | None:
        """Returns why the equation cannot be handled; None if it can."""
        batch = self.inputs[0]
        if self.outputs[0] != batch or batch in self.kernel:
            return "the equation does not keep the example axis in front"
        terms = (self.inputs, self.outputs, self.kernel)
        if any(len(set(term)) != len(term) for term in terms):
            return "the equation repeats a label"
        if len(self.groups + self.contracted + self.produced) != len(self.kernel):
            return "the equation sums the kernel by itself"
        alone = set(self.inputs) - set(self.outputs) - set(self.kernel)
        if lora and (self.kernel[-1] in self.groups or alone):
            return "LoRA is enabled on an equation it does not factorize"
        return None

    def factor(self, x: tf.Tensor, g: tf.Tensor, kernel_shape: tuple[int, ...]) -> Outer:
        """Returns the kernel's gradient as `Outer`."""
        batch = self.inputs[0]
        a = _arranged(x, self.inputs, [batch, self.groups, self.positions, self.contracted])
        b = _arranged(g, self.outputs, [batch, self.groups, self.positions, self.produced])
        order = self.groups + self.contracted + self.produced
        sizes = dict(zip(self.kernel, kernel_shape, strict=True))
        split = tuple(sizes[c] for c in order)
        return Outer(a, b, Layout(kernel_shape, split, tuple(order.index(c) for c in self.kernel)))


def _unused(equation: str) -> list[str]:
    return [c for c in map(chr, range(ord("A"), ord("Z") + 1)) if c not in equation]


def _arranged(tensor: tf.Tensor, labels: str, blocks: list[str]) -> tf.Tensor:
    """Returns `tensor` with an axis for each block of labels; other labels are summed."""
    wanted = "".join(blocks)
    summed = [i for i, c in enumerate(labels) if c not in wanted]
    if summed:
        tensor = tf.reduce_sum(tensor, axis=summed)
        labels = "".join(c for c in labels if c in wanted)
    tensor = _permuted(tensor, labels, wanted)
    sizes = dict(zip(wanted, dims(tensor), strict=True))
    return tf.reshape(tensor, [product([sizes[c] for c in block]) for block in blocks])


def _permuted(tensor: tf.Tensor, labels: str, wanted: str) -> tf.Tensor:
    if labels == wanted:
        return tensor
    return tf.transpose(tensor, [labels.index(c) for c in wanted])
