"""Clipping rules of kernels with carriers: two thin products in place of x'g.

W = L R + (W - L R), the second part constant. To the first the layer is two layers: one of r
outputs with the kernel L, then a matrix R. So the rule of the layer's own type gives dL, from the
same inputs x and the gradient g R'; and dR is (x L)' g.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import keras
import tensorflow as tf

from keras_bandmf._keras_internals import kernel_of, table_of
from keras_bandmf.clipping import LayerRule
from keras_bandmf.clipping.factors import (
    Factor,
    Layout,
    Outer,
    Rows,
    Unsupported,
    grouped_positions,
)
from keras_bandmf.clipping.merge import merged
from keras_bandmf.clipping.rules.base import DenseRule, LinearRule, constant
from keras_bandmf.clipping.rules.conv import ConvRule
from keras_bandmf.clipping.rules.einsum import EinsumDenseRule
from keras_bandmf.clipping.rules.embedding import EmbeddingRule, nearest_ids
from keras_bandmf.clipping.shapes import dims, positions, product, static
from keras_bandmf.rgp import algebra
from keras_bandmf.rgp.carrier import Carrier
from keras_bandmf.rgp.layouts import EinsumLabels, einsum_labels, kind_of

# The rules of layers that can have carriers. Each may refuse a layer when it is used.
_RULES: dict[type, LinearRule] = {
    keras.layers.Dense: DenseRule(),
    keras.layers.EinsumDense: EinsumDenseRule(),
    keras.layers.Embedding: EmbeddingRule(),
    keras.layers.Conv2D: ConvRule(),
}


def type_rule(layer: keras.layers.Layer) -> LinearRule:
    """Returns the clipping rule of the type of a layer that can have carriers.

    Raises:
        TypeError: If layers of this type cannot have carriers.
    """
    kind = kind_of(layer)
    if kind is None:
        raise TypeError(
            "Expected a layer that can have carriers: Dense, EinsumDense, Embedding or Conv2D. "
            f"Received: layer '{layer.path}' of type {type(layer).__name__}"
        )
    return _RULES[kind]


class CarrierFactor:
    """Coordinates (dL - L L' dL, dR) of the gradients of one kernel, as factors.

    The part L L' dL is never formed for an example: as it is orthogonal to the rest, its squared
    norm is subtracted, and that is L' dL = (x L)' (g R'), an r by r matrix.

    Args:
        carrier: The carrier of the kernel.
        whole: The factor of dL, before the part inside L is taken out.
        a: Shape (batch, 1, positions, r): x L.
        thin: Shape (batch, 1, positions, r): g R'.
        g: Shape (batch, 1, positions, n): the output gradients.
    """

    def __init__(
        self,
        carrier: Carrier,
        whole: Factor,
        a: tf.Tensor,
        thin: tf.Tensor,
        g: tf.Tensor,
    ):
        self.carrier = carrier
        self.whole = whole
        self.a = a
        self.thin = thin
        self.g = g

    def joined(self, factors: Sequence[Factor]) -> CarrierFactor:
        """Returns the sum of all calls of one kernel, ready for use."""
        own = [factor for factor in factors if isinstance(factor, CarrierFactor)]
        if len(own) < len(factors):
            raise Unsupported("one variable is used by layers of different kinds (tied weights)")

        def joined(parts: list[tf.Tensor]) -> tf.Tensor:
            return parts[0] if len(parts) == 1 else tf.concat(parts, axis=2)

        whole = merged([factor.whole for factor in own])
        a, thin, g = (joined([getattr(f, name) for f in own]) for name in ("a", "thin", "g"))
        return CarrierFactor(self.carrier, whole, a, thin, g)

    def grouped(self, size: int, mask: tf.Tensor) -> CarrierFactor:
        """Returns the coordinates of the summed gradients of the rows of each example."""
        a, thin, g = (grouped_positions(part, size, mask) for part in (self.a, self.thin, self.g))
        return CarrierFactor(self.carrier, self.whole.grouped(size, mask), a, thin, g)

    def resolved(self) -> CarrierFactor:
        """Returns itself: `joined` brings its parts into the cheapest form."""
        return self

    def _right(self) -> Factor:
        layout = Layout((self.carrier.rank, self.carrier.layout.sides[1]))
        return merged([Outer(self.a, self.g, layout)])

    def _inside(self) -> tf.Tensor:
        """Returns squared norms of L' dL that are never too large, because they are subtracted."""
        if isinstance(self.whole, Rows):
            # From the very numbers that are summed. Where positions cancel, little but rounding
            # is left of them, and another product would round in another way.
            left, _ = self.carrier.pair(self.g.dtype)
            values = tf.reshape(self.whole.values, [-1, *left.shape])  # no layout permutes them
            return _squared(tf.matmul(left[None], values, transpose_a=True))
        if static(dims(self.a)[2]) == 1:
            return _squared(self.a) * _squared(self.thin)
        return _squared(tf.matmul(self.a[:, 0], self.thin[:, 0], transpose_a=True))

    def squared_norms(self) -> tf.Tensor:
        """Returns squared norms of the coordinates, (batch,)."""
        left, right = self.whole.squared_norms(), self._right().squared_norms()
        total = left - self._inside() + right
        # |dR| >= |L' dL|, so the true sum is at least either: rounding cannot hide a gradient.
        # A NaN compares as False and stays.
        floor = tf.maximum(left, right)
        return tf.where(total < floor, floor, total)

    def weighted_sum(self, weights: tf.Tensor) -> tf.Tensor:
        """Returns the sum over examples of weight times coordinates, (r (m + n),)."""
        left, _ = self.carrier.pair(self.g.dtype)
        total, right = (
            tf.cast(factor.weighted_sum(weights), left.dtype)
            for factor in (self.whole, self._right())
        )
        total = tf.reshape(total, left.shape)
        total -= algebra.inside(total, left)
        return self.carrier.joined(total, right)


class ForwardedRule(LayerRule):
    """A rule that leaves everything but the gradients to that of the layer's type.

    Args:
        rule: The rule of the layer's type.
    """

    def __init__(self, rule: LayerRule):
        self.rule = rule

    def refuses(self, layer: keras.layers.Layer) -> str | None:
        """Returns what the rule of the layer's type answers."""
        return self.rule.refuses(layer)

    def forward(self, layer: keras.layers.Layer, inputs: tf.Tensor) -> tuple[tf.Tensor, Any]:
        """Computes what the rule of the layer's type computes."""
        return self.rule.forward(layer, inputs)

    def finish(self, layer: keras.layers.Layer, outputs: tf.Tensor, saved: Any) -> tf.Tensor:
        """Computes what the rule of the layer's type computes."""
        return self.rule.finish(layer, outputs, saved)


class CarrierRule(ForwardedRule):
    """The rule of a layer whose kernel has carriers.

    Args:
        rule: The rule of the layer's type, which answers for everything but the kernel.
        carrier: The carrier of the kernel.
    """

    def __init__(self, rule: LinearRule, carrier: Carrier):
        super().__init__(rule)
        self.carrier = carrier
        self._linear_rule = rule

    def gradients(
        self, layer: keras.layers.Layer, saved: Any, g: tf.Tensor
    ) -> Sequence[tuple[keras.Variable, Factor]]:
        """Returns the coordinates of the kernel's gradients, and all others as they are."""
        table = isinstance(self.rule, EmbeddingRule)
        kernel = table_of(layer) if table else kernel_of(layer)
        found = []
        for variable, factor in self.rule.gradients(layer, saved, g):
            # The factor of the kernel is not used, and no graph will compute it.
            own = variable is kernel
            found.append((variable, self._factor(layer, saved, g) if own else factor))
        return found

    def _factor(self, layer: keras.layers.Layer, saved: Any, g: tf.Tensor) -> CarrierFactor:
        """Returns the coordinates of the kernel's gradients, one for each example."""
        left, right = self.carrier.pair(g.dtype)
        shape = (*self.carrier.layout.row_shape, self.carrier.rank)
        kernel = constant(tf.reshape(left, shape))
        rule, ends = self._linear_rule, _ends_of(layer)
        if isinstance(ends, _EinsumEnds):
            rule = EinsumDenseRule(ends.thin_equation)
        table = isinstance(rule, EmbeddingRule)
        inputs = nearest_ids(saved, layer.input_dim) if table else tf.cast(saved, g.dtype)
        columns = tf.reshape(right, (self.carrier.rank, *self.carrier.layout.column_shape))
        thin = ends.thin(g, columns)
        a = rule.linear(layer, inputs, kernel)
        whole = rule.kernel_factor(layer, inputs, thin, shape)
        return CarrierFactor(self.carrier, whole, ends.rows(a), ends.rows(thin), ends.columns(g))


class _LastAxis:
    """The outputs of Dense, Embedding and Conv2D: features are the last axis.

    Args:
        channels_first: Whether they are axis 1 of a picture instead.
    """

    def __init__(self, channels_first: bool = False):
        self._channels_first = channels_first

    def thin(self, g: tf.Tensor, right: tf.Tensor) -> tf.Tensor:
        """Returns g R', arranged as the outputs of a layer with r features."""
        thin = tf.tensordot(self._last(g), right, [[-1], [1]])
        return tf.transpose(thin, [0, 3, 1, 2]) if self._channels_first else thin

    def rows(self, outputs: tf.Tensor) -> tf.Tensor:
        """Returns outputs of r features as (batch, 1, positions, r)."""
        return positions(self._last(outputs))

    def columns(self, outputs: tf.Tensor) -> tf.Tensor:
        """Returns outputs of the layer as (batch, 1, positions, n)."""
        return positions(self._last(outputs))

    def _last(self, outputs: tf.Tensor) -> tf.Tensor:
        return tf.transpose(outputs, [0, 2, 3, 1]) if self._channels_first else outputs


class _EinsumEnds:
    """The outputs of EinsumDense: the labels that the kernel produces give way to one, the rank."""

    def __init__(self, labels: EinsumLabels):
        self._labels = labels
        #: The equation of the layer with the left carrier for its kernel.
        self.thin_equation = f"{labels.inputs},{labels.contracted}{labels.rank}->{labels.through}"

    def thin(self, g: tf.Tensor, right: tf.Tensor) -> tf.Tensor:
        """Returns g R', arranged as the outputs of `thin_equation`."""
        labels = self._labels
        second = f"{labels.rank}{labels.produced}"
        return tf.einsum(f"{labels.outputs},{second}->{labels.through}", g, right)

    def rows(self, outputs: tf.Tensor) -> tf.Tensor:
        """Returns outputs of `thin_equation` as (batch, 1, positions, r)."""
        return positions(outputs)

    def columns(self, outputs: tf.Tensor) -> tf.Tensor:
        """Returns outputs of the layer as (batch, 1, positions, n)."""
        labels = self._labels
        kept = "".join(c for c in labels.outputs if c not in labels.produced)
        last = tf.einsum(f"{labels.outputs}->{kept}{labels.produced}", outputs)
        sizes, count = dims(last), len(labels.produced)
        width = product(sizes[len(sizes) - count :])
        return positions(tf.reshape(last, [*sizes[: len(sizes) - count], width]))


def _ends_of(layer: keras.layers.Layer) -> _LastAxis | _EinsumEnds:
    """Returns how the outputs of a layer with carriers are arranged."""
    kind = kind_of(layer)
    if kind is not keras.layers.EinsumDense:
        return _LastAxis(kind is keras.layers.Conv2D and layer.data_format == "channels_first")
    labels = einsum_labels(layer.equation)
    if labels is None:
        raise Unsupported(f"{layer.path}: its kernel is not one matrix for all positions")
    return _EinsumEnds(labels)


def _squared(values: tf.Tensor) -> tf.Tensor:
    return tf.reduce_sum(tf.square(values), axis=list(range(1, values.shape.rank)))
