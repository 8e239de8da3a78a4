"""A clipping rule per layer type: how its call is tapped, and its per-example gradients."""

from __future__ import annotations

from typing import Any

import keras
import tensorflow as tf

from keras_bandmf.clipping.factors import Factor, Lookup, Outer, Rows
from keras_bandmf.clipping.shapes import dims, positions, product, sum_to


class LayerRule:
    """How one layer type takes the book-keeping path.

    `forward` computes what the layer's `call` computes, up to and without the activation function,
    from weights behind `constant`; what it returns is watched by the tape. `finish` does the rest.
    `gradients` turns what was saved and the gradient of the pre-activation into factors. Axis 0 is
    the example throughout.

    Formal guarantees: none by itself. `check_model` compares every rule of a model with
    one-example-at-a-time gradients before training, and a layer that fails goes the general path.
    """

    def refuses(self, layer: keras.layers.Layer) -> str | None:
        """Why this layer, though of the right type, must go the general path; else None."""
        return None

    def forward(self, layer: keras.layers.Layer, inputs: Any) -> tuple[tf.Tensor, Any]:
        """The pre-activation and whatever `gradients` needs to see again."""
        raise NotImplementedError

    def finish(self, layer: keras.layers.Layer, outputs: tf.Tensor) -> tf.Tensor:
        """From the pre-activation to the layer's outputs."""
        activation = getattr(layer, "activation", None)
        return outputs if activation is None else activation(outputs)

    def gradients(
        self, layer: keras.layers.Layer, saved: Any, g: tf.Tensor
    ) -> list[tuple[keras.Variable, Factor]]:
        """A factor per variable of the layer; those of frozen variables are never used.

        Args:
            layer: the layer.
            saved: second result of `forward`.
            g: gradient of the summed losses by the pre-activation, float32 or float64.
        """
        raise NotImplementedError


def constant(variable: Any) -> tf.Tensor:
    """The value of a weight, in the dtype the layer computes in, behind `stop_gradient`."""
    return tf.stop_gradient(keras.ops.convert_to_tensor(variable))


class _KernelRule(LayerRule):
    """What layers with a `_kernel`, a `bias` and an activation have in common."""

    def refuses(self, layer: keras.layers.Layer) -> str | None:
        if getattr(layer, "lora_enabled", False):
            return "LoRA is enabled"
        if getattr(layer, "quantization_mode", None) is not None:
            return "the layer is quantized"
        return None


class DenseRule(_KernelRule):
    """Dense on (batch, ..., in)."""

    def forward(self, layer, inputs):
        outputs = keras.ops.matmul(inputs, constant(layer.kernel))
        if layer.bias is not None:
            outputs = keras.ops.add(outputs, constant(layer.bias))
        return outputs, inputs

    def gradients(self, layer, saved, g):
        x = tf.cast(saved, g.dtype)
        found = [(layer._kernel, Outer(positions(x), positions(g), _first_group))]
        if layer.bias is not None:
            found.append((layer.bias, Rows(sum_to(g, tuple(layer.bias.shape)))))
        return found


class EinsumDenseRule(_KernelRule):
    """EinsumDense with any equation whose batch label stays in front and out of the kernel."""

    def refuses(self, layer):
        reason = super().refuses(layer)
        if reason is None and "." not in layer.equation:
            reason = _Equation(layer.equation, None).refuses()
        return reason

    def forward(self, layer, inputs):
        outputs = keras.ops.einsum(layer.equation, inputs, constant(layer.kernel))
        if layer.bias is not None:
            outputs = keras.ops.add(outputs, constant(layer.bias))
        return outputs, inputs

    def gradients(self, layer, saved, g):
        x = tf.cast(saved, g.dtype)
        equation = _Equation(layer.equation, x.shape.rank)
        found = [(layer._kernel, equation.factor(x, g, tuple(layer._kernel.shape)))]
        if layer.bias is not None:
            found.append((layer.bias, Rows(sum_to(g, tuple(layer.bias.shape)))))
        return found


class EmbeddingRule(LayerRule):
    """Embedding on (batch, ...) integers."""

    def refuses(self, layer):
        return _KernelRule.refuses(self, layer)

    def forward(self, layer, inputs):
        if inputs.dtype not in (tf.int32, tf.int64):
            inputs = tf.cast(inputs, tf.int32)
        ids = tf.where(inputs < 0, inputs + layer.input_dim, inputs)
        return keras.ops.take(constant(layer.embeddings), ids, axis=0), ids

    def finish(self, layer, outputs):
        return keras.ops.cast(outputs, layer.compute_dtype)

    def gradients(self, layer, saved, g):
        sizes = dims(saved)
        ids = tf.cast(tf.reshape(saved, [sizes[0], product(sizes[1:])]), tf.int32)
        return [(layer._embeddings, Lookup(ids, positions(g)[:, 0], layer.input_dim))]


class _ScaleRule(LayerRule):
    """Normalisations: outputs = gamma * normalised + beta, computed in at least float32."""

    def normalised(self, layer: keras.layers.Layer, inputs: tf.Tensor) -> tf.Tensor:
        raise NotImplementedError

    def axes(self, layer: keras.layers.Layer, rank: int) -> list[int]:
        raise NotImplementedError

    def refuses(self, layer):
        axes = layer.axis if isinstance(layer.axis, (list, tuple)) else [layer.axis]
        return "it normalises over axis 0" if 0 in axes else None

    def forward(self, layer, inputs):
        wide = tf.cast(inputs, tf.float64 if inputs.dtype == tf.float64 else tf.float32)
        normalised = self.normalised(layer, wide)
        axes = self.axes(layer, wide.shape.rank)
        shape = [wide.shape[i] if i in axes else 1 for i in range(wide.shape.rank)]
        outputs = normalised
        if layer.gamma is not None:
            outputs *= tf.cast(tf.reshape(constant(layer.gamma), shape), wide.dtype)
        if layer.beta is not None:
            outputs += tf.cast(tf.reshape(constant(layer.beta), shape), wide.dtype)
        # A layer without gamma and beta has nothing to tap; identity keeps the tensor its own.
        return tf.identity(outputs), (normalised, inputs.dtype)

    def finish(self, layer, outputs):
        return keras.ops.cast(outputs, layer.compute_dtype)

    def gradients(self, layer, saved, g):
        normalised = tf.cast(saved[0], g.dtype)
        axes = self.axes(layer, g.shape.rank)
        others = [i for i in range(1, g.shape.rank) if i not in axes]
        found = []
        if layer.gamma is not None:
            found.append((layer.gamma, Rows(tf.reduce_sum(normalised * g, axis=others))))
        if layer.beta is not None:
            found.append((layer.beta, Rows(tf.reduce_sum(g, axis=others))))
        return found


class LayerNormalizationRule(_ScaleRule):
    """LayerNormalization over any axes but the first."""

    def normalised(self, layer, inputs):
        return keras.ops.layer_normalization(
            inputs,
            None,
            None,
            axis=layer.axis,
            epsilon=layer.epsilon,
            **({"rms_scaling": True} if layer.rms_scaling else {}),
        )

    def axes(self, layer, rank):
        return sorted(a % rank for a in layer.axis)


class GroupNormalizationRule(_ScaleRule):
    """GroupNormalization; the statistics are those of one example."""

    def normalised(self, layer, inputs):
        axis = layer.axis % inputs.shape.rank
        sizes = dims(inputs)
        grouped = sizes[:axis] + [layer.groups, sizes[axis] // layer.groups] + sizes[axis + 1 :]
        x = tf.reshape(inputs, grouped)
        over = [i for i in range(1, x.shape.rank) if i != axis]
        mean, variance = tf.nn.moments(x, over, keepdims=True)
        return tf.reshape((x - mean) * tf.math.rsqrt(variance + layer.epsilon), sizes)

    def axes(self, layer, rank):
        return [layer.axis % rank]


class _Equation:
    """Labels of an einsum "inputs,kernel->outputs", sorted by where they occur."""

    def __init__(self, equation: str, rank: int | None):
        left, self.outputs = equation.replace(" ", "").split("->")
        self.inputs, self.kernel = left.split(",")
        if "..." in equation:
            unused = [c for c in map(chr, range(ord("A"), ord("Z") + 1)) if c not in equation]
            fresh = "".join(unused[: rank - len(self.inputs.replace("...", ""))])
            self.inputs = self.inputs.replace("...", fresh)
            self.outputs = self.outputs.replace("...", fresh)
        ins, outs, kernel = set(self.inputs), set(self.outputs), self.kernel
        self.groups = "".join(c for c in kernel if c in ins and c in outs)
        self.contracted = "".join(c for c in kernel if c in ins and c not in outs)
        self.produced = "".join(c for c in kernel if c in outs and c not in ins)
        self.positions = "".join(c for c in self.inputs[1:] if c in outs and c not in kernel)

    def refuses(self) -> str | None:
        batch = self.inputs[0]
        if self.outputs[0] != batch or batch in self.kernel:
            return "the equation does not keep the example axis in front"
        terms = (self.inputs, self.outputs, self.kernel)
        if any(len(set(term)) != len(term) for term in terms):
            return "the equation repeats a label"
        if len(self.groups + self.contracted + self.produced) != len(self.kernel):
            return "the equation sums the kernel by itself"
        return None

    def factor(self, x: tf.Tensor, g: tf.Tensor, kernel_shape: tuple[int, ...]) -> Outer:
        """The kernel's gradient as `Outer`."""
        batch = self.inputs[0]
        a = _arranged(x, self.inputs, [batch, self.groups, self.positions, self.contracted])
        b = _arranged(g, self.outputs, [batch, self.groups, self.positions, self.produced])
        order = self.groups + self.contracted + self.produced
        sizes = dict(zip(self.kernel, kernel_shape, strict=True))

        def layout(total: tf.Tensor) -> tf.Tensor:
            total = tf.reshape(total, [sizes[c] for c in order])
            return _permuted(total, order, self.kernel)

        return Outer(a, b, layout)


def _arranged(tensor: tf.Tensor, labels: str, blocks: list[str]) -> tf.Tensor:
    """`tensor` with its axes put into `blocks` of labels, one axis a block; other labels summed."""
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


def _first_group(total: tf.Tensor) -> tf.Tensor:
    return total[0]
