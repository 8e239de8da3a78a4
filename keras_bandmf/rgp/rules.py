"""Clipping rules of kernels with carriers: two thin products in place of x'g.

W = L R + (W - L R), the second part constant. To the first the layer is two layers: one of r
outputs with the kernel L, then a matrix R. So the rule of the layer's own type gives dL, from the
same inputs x and the gradient g R'; and dR is (x L)' g.
"""

from __future__ import annotations

from typing import Any

import keras
import tensorflow as tf

from keras_bandmf.clipping import LayerRule
from keras_bandmf.clipping.factors import Layout, Outer, Rows
from keras_bandmf.clipping.merge import Factor, merged
from keras_bandmf.clipping.rules.base import DenseRule
from keras_bandmf.clipping.rules.conv import ConvRule
from keras_bandmf.clipping.rules.einsum import EinsumDenseRule
from keras_bandmf.clipping.rules.embedding import EmbeddingRule, nearest_ids
from keras_bandmf.clipping.shapes import dims, positions, static
from keras_bandmf.rgp import algebra
from keras_bandmf.rgp.carrier import Carrier
from keras_bandmf.rgp.layouts import einsum_labels, kind_of

# Of the layers a carrier can be on; each refuses a layer, when it is used, for its own reasons.
_RULES = {
    keras.layers.Dense: DenseRule(),
    keras.layers.EinsumDense: EinsumDenseRule(),
    keras.layers.Embedding: EmbeddingRule(),
    keras.layers.Conv2D: ConvRule(),
}


def type_rule(layer: keras.layers.Layer) -> LayerRule:
    """The clipping rule of the type of a layer that can have carriers."""
    return _RULES[kind_of(layer)]


class CarrierFactor:
    """Coordinates (dL - L L' dL, dR) of the gradients of one kernel, as factors.

    The part L L' dL is never formed for an example: as it is orthogonal to the rest, its squared
    norm is subtracted, and that is L' dL = (x L)' (g R'), an r by r matrix.

    Args:
        carrier: of the kernel.
        whole: dL as a factor, before the part inside L is taken out.
        a: x L, (batch, 1, positions, r).
        thin: g R', (batch, 1, positions, r).
        g: (batch, 1, positions, n).
    """

    def __init__(
        self, carrier: Carrier, whole: Factor, a: tf.Tensor, thin: tf.Tensor, g: tf.Tensor
    ):
        self.carrier = carrier
        self.whole = whole
        self.a = a
        self.thin = thin
        self.g = g

    def joined(self, factors: list[CarrierFactor]) -> CarrierFactor:
        """All calls of one kernel as one factor ready for use."""

        def joined(name: str) -> tf.Tensor:
            parts = [getattr(factor, name) for factor in factors]
            return parts[0] if len(parts) == 1 else tf.concat(parts, axis=2)

        whole = merged([factor.whole for factor in factors])
        return CarrierFactor(self.carrier, whole, joined("a"), joined("thin"), joined("g"))

    def _right(self) -> Factor:
        layout = Layout((self.carrier.rank, self.carrier.layout.sides[1]))
        return merged([Outer(self.a, self.g, layout)])

    def _inside(self) -> tf.Tensor:
        """Squared norms of L' dL, never too large: they are subtracted."""
        if isinstance(self.whole, Rows):
            # Of the very numbers that are summed: where positions cancel, little but rounding is
            # left of them, and another product rounds in another way.
            left, _ = self.carrier.pair(self.g.dtype)
            values = tf.reshape(self.whole.values, [-1, *left.shape])  # no layout permutes them
            return _squared(tf.matmul(left[None], values, transpose_a=True))
        if static(dims(self.a)[2]) == 1:
            return _squared(self.a) * _squared(self.thin)
        return _squared(tf.matmul(self.a[:, 0], self.thin[:, 0], transpose_a=True))

    def squared_norms(self) -> tf.Tensor:
        """Squared norms of the coordinates, (batch,)."""
        left, right = self.whole.squared_norms(), self._right().squared_norms()
        total = left - self._inside() + right
        # |dR| >= |L' dL|, so the true sum is at least either: rounding cannot hide a gradient.
        # A NaN compares as False and stays.
        floor = tf.maximum(left, right)
        return tf.where(total < floor, floor, total)

    def weighted_sum(self, weights: tf.Tensor) -> tf.Tensor:
        """Sum over examples of weight times coordinates, (r (m + n),)."""
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
        rule: of the layer's type.
    """

    def __init__(self, rule: LayerRule):
        self.rule = rule

    def refuses(self, layer):
        return self.rule.refuses(layer)

    def forward(self, layer, inputs):
        return self.rule.forward(layer, inputs)

    def finish(self, layer, outputs, saved):
        return self.rule.finish(layer, outputs, saved)


class CarrierRule(ForwardedRule):
    """The rule of a layer whose kernel has carriers.

    Args:
        rule: of the layer's type; everything but the kernel is left to it.
        carrier: of the kernel.
    """

    def __init__(self, rule: LayerRule, carrier: Carrier):
        super().__init__(rule)
        self.carrier = carrier

    def gradients(self, layer, saved, g):
        kernel = layer._embeddings if hasattr(layer, "_embeddings") else layer._kernel
        found = []
        for variable, factor in self.rule.gradients(layer, saved, g):
            # The factor of the kernel is not used, and no graph will compute it.
            own = variable is kernel
            found.append((variable, self._factor(layer, saved, g) if own else factor))
        return found

    def _factor(self, layer: keras.layers.Layer, saved: Any, g: tf.Tensor) -> CarrierFactor:
        left, right = self.carrier.pair(g.dtype)
        kind = kind_of(layer)
        table = kind is keras.layers.Embedding
        inputs = nearest_ids(saved, layer.input_dim) if table else tf.cast(saved, g.dtype)
        split = _einsum_split if kind is keras.layers.EinsumDense else _split
        through, thin, arranged = split(self.carrier, layer, kind, left, right, g)
        a, _ = self.rule.forward(through, inputs)
        whole = self.rule.gradients(through, inputs, thin)[0][1]
        return CarrierFactor(self.carrier, whole, *arranged(a, thin, g))


class _Through:
    """A layer with the left carrier for its kernel, as far as clipping rules look at it."""

    def __init__(self, layer: keras.layers.Layer, **own: Any):
        self._layer = layer
        self.__dict__.update(own)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._layer, name)


def _split(carrier, layer, kind, left, right, g):
    """Dense, Embedding, Conv2D: features are the last axis, or axis 1."""
    first = kind is keras.layers.Conv2D and layer.data_format == "channels_first"
    g_last = tf.transpose(g, [0, 2, 3, 1]) if first else g
    thin = tf.tensordot(g_last, right, [[-1], [1]])
    kernel = tf.reshape(left, (*carrier.layout.row_shape, carrier.rank))
    if kind is keras.layers.Embedding:
        through = _Through(layer, embeddings=kernel, _embeddings=kernel)
    else:
        through = _Through(layer, kernel=kernel, _kernel=kernel, bias=None, use_bias=False)

    def arranged(a: tf.Tensor, thin: tf.Tensor, g: tf.Tensor) -> list[tf.Tensor]:
        tensors = (a, thin, g)
        if first:
            tensors = [tf.transpose(t, [0, 2, 3, 1]) for t in tensors]
        return [positions(t) for t in tensors]

    return through, tf.transpose(thin, [0, 3, 1, 2]) if first else thin, arranged


def _einsum_split(carrier, layer, kind, left, right, g):
    """EinsumDense: the kernel's produced labels give way to one, the rank."""
    labels = einsum_labels(layer.equation)
    kernel = tf.reshape(left, (*carrier.layout.row_shape, carrier.rank))
    first = f"{labels.inputs},{labels.contracted}{labels.rank}->{labels.through}"
    second = f"{labels.rank}{labels.produced}"
    shape = (carrier.rank, *carrier.layout.column_shape)
    thin = tf.einsum(f"{labels.outputs},{second}->{labels.through}", g, tf.reshape(right, shape))
    through = _Through(layer, kernel=kernel, _kernel=kernel, equation=first, bias=None)
    ordered = "".join(c for c in labels.outputs if c not in labels.produced) + labels.produced

    def arranged(a: tf.Tensor, thin: tf.Tensor, g: tf.Tensor) -> list[tf.Tensor]:
        last = tf.einsum(f"{labels.outputs}->{ordered}", g)
        sizes, count = dims(last), len(labels.produced)
        last = tf.reshape(last, [*sizes[: len(sizes) - count], carrier.layout.sides[1]])
        return [positions(a), positions(thin), positions(last)]

    return through, thin, arranged


def _squared(values: tf.Tensor) -> tf.Tensor:
    return tf.reduce_sum(tf.square(values), axis=list(range(1, values.shape.rank)))
