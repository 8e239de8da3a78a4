"""What a clipping rule is: how a layer's call is recorded, and its per-example gradients."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

import keras
import tensorflow as tf

from keras_bandmf._keras_internals import kernel_of, stored_value
from keras_bandmf.clipping.factors import Factor, Layout, Outer, Rows, Unsupported
from keras_bandmf.clipping.shapes import positions, sum_to


class LayerRule:
    """How layers of one type take the book-keeping path. Derive from it for a layer of your own.

    `forward` computes what the layer's `call` computes, up to but without the activation function,
    from weights behind `constant`. The gradient tape watches what it returns. `finish` does the
    rest. `gradients` turns what was saved and the gradient of the pre-activation into factors. Axis
    0 is the example throughout. The docstring of `register_rule` has a whole example.

    Attributes:
        whole: Whether the rule also stands for all layers inside its layer, such as the cell of a
            recurrent layer: they are not recorded, and need no rule.
        example_axis: The axis of the examples in what `forward` returns first.

    Formal guarantees: the clipped sum of whatever factors a rule returns has norm at most the clip,
    example by example, provided row i of them depends on example i alone. That they are the layer's
    gradients is tested: `check_model` compares every rule of a model with one-example-at-a-time
    gradients before training, and a layer that fails goes the general path; `check_rule` does it
    for one layer.

    Example:
        >>> import keras
        >>> import numpy as np
        >>> from keras_bandmf import clipping
        >>> class Shift(keras.layers.Layer):
        ...     def build(self, shape):
        ...         self.shift = self.add_weight(shape=shape[1:])
        ...
        ...     def call(self, inputs):
        ...         return inputs + self.shift
        >>> class ShiftRule(clipping.LayerRule):
        ...     def forward(self, layer, inputs):
        ...         return inputs + clipping.constant(layer.shift), None
        ...
        ...     def gradients(self, layer, saved, g):
        ...         return [(layer.shift, clipping.Rows(g))]
        >>> clipping.register_rule(Shift, ShiftRule())
        >>> clipping.check_rule(Shift(dtype="float64"), np.ones((2, 3))) < 1e-12
        True
    """

    whole = False
    example_axis = 0

    def refuses(self, layer: keras.layers.Layer) -> str | None:
        """Returns why the rule does not fit this layer, though it is of the right type, or None."""
        return None

    def uses(self, layer: keras.layers.Layer) -> list[keras.Variable]:
        """Returns weights of layers inside this one that the rule uses in place of those layers."""
        return []

    def recorded(
        self, layer: keras.layers.Layer, args: tuple, kwargs: dict[str, Any]
    ) -> tuple[Any, Any]:
        """Returns what `forward` returns for a call of the layer with these arguments.

        Raises:
            Unsupported: If the first argument is not a tensor, or another one is not at its default
                and is not named by `forward`.
        """
        signature = inspect.signature(type(layer).call)
        (_, inputs), *rest = list(signature.bind(layer, *args, **kwargs).arguments.items())[1:]
        named = inspect.signature(self.forward).parameters
        arguments = {}
        for name, value in rest:
            if name in named:
                arguments[name] = value
            elif name != "training" and value is not signature.parameters[name].default:
                raise Unsupported(
                    f"{layer.path}: called with `{name}`, which its rule does not know"
                )
        if not isinstance(inputs, tf.Tensor):
            raise Unsupported(f"{layer.path}: inputs are {type(inputs).__name__}, not a tensor")
        return self.forward(layer, inputs, **arguments)

    def forward(
        self, layer: keras.layers.Layer, inputs: Any, *args: Any, **kwargs: Any
    ) -> tuple[tf.Tensor, Any]:
        """Computes the pre-activation of a call of the layer.

        A rule names the further arguments of `call` that it knows in its own signature: a call
        with any other argument goes the general path.

        Args:
            layer: The layer.
            inputs: The first argument of its `call`, a tensor.
            *args: Not used: further arguments are passed by name.
            **kwargs: The further arguments of `call` by name. Those at their default, and
                `training`, are left out.

        Returns:
            (The pre-activation, what `gradients` needs to see again.) Of several tensors that
            depend on the weights the first result is a list.
        """
        raise NotImplementedError

    def finish(self, layer: keras.layers.Layer, outputs: tf.Tensor, saved: Any) -> tf.Tensor:
        """Returns the layer's outputs from the pre-activation and what `forward` saved."""
        activation = getattr(layer, "activation", None)
        return outputs if activation is None else activation(outputs)

    def gradients(
        self, layer: keras.layers.Layer, saved: Any, g: tf.Tensor
    ) -> Sequence[tuple[keras.Variable, Factor]]:
        """Returns a factor for each variable of the layer.

        Args:
            layer: The layer.
            saved: The second result of `forward`.
            g: The gradient of the summed losses by the pre-activation, float32 or float64; of a
                list of tensors a list.

        Returns:
            (variable, factor) for each variable. Those of frozen variables are never used.
        """
        raise NotImplementedError


def constant(variable: Any) -> tf.Tensor:
    """Returns the value of a weight, in the dtype the layer computes in, behind `stop_gradient`.

    A rule's `forward` reads weights through it, because the gradients by the weights are the task
    of the rule's `gradients`.

    Args:
        variable: A weight of the layer.

    Example:
        >>> import keras
        >>> from keras_bandmf import clipping
        >>> clipping.constant(keras.Variable([1.0, 2.0])).numpy()
        array([1., 2.], dtype=float32)
    """
    return tf.stop_gradient(keras.ops.convert_to_tensor(variable))


def called_method(layer: keras.layers.Layer) -> str:
    """Returns the name of the method that Keras runs when the layer is called."""
    return "call" if getattr(layer, "quantization_mode", None) is None else "quantized_call"


def quantized_outputs(layer: keras.layers.Layer, inputs: tf.Tensor) -> tf.Tensor:
    """Returns the outputs of a quantized layer, with its trained weights behind `stop_gradient`."""
    variables = layer.trainable_variables
    values = [(v, tf.stop_gradient(stored_value(v))) for v in variables]
    with keras.StatelessScope(state_mapping=values):
        return type(layer).quantized_call(layer, inputs)  # that of the instance is recorded


def lora_scale(layer: keras.layers.Layer) -> float:
    """Returns the factor in front of A B in a layer whose LoRA is enabled."""
    return layer.lora_alpha / layer.lora_rank


def wide(variable: keras.Variable, like: tf.Tensor) -> tf.Tensor:
    """Returns the value of a weight in the dtype in which gradients are kept."""
    return tf.cast(constant(variable), like.dtype)


class KernelRule(LayerRule):
    """What the rules of layers with a kernel, a bias, LoRA and an activation have in common.

    Attributes:
        knows_int8: Whether the rule gives the gradients of LoRA and bias over a kernel in int8.
    """

    knows_int8 = False

    def refuses(self, layer: keras.layers.Layer) -> str | None:
        """Returns a reason for a quantized layer, unless it is one that the rule knows."""
        mode = getattr(layer, "quantization_mode", None)
        # `quantized_call` does not give what comes before an activation.
        plain = getattr(layer, "activation", None) in (None, keras.activations.linear)
        if mode is None or (self.knows_int8 and mode == "int8" and plain):
            return None
        return f"the layer is quantized ({mode})"


class LinearRule(KernelRule):
    """A rule of a layer whose pre-activation is linear in one kernel, up to a bias.

    The two methods answer for any kernel in place of the layer's own, such as the low-rank
    carriers of RGP. They know nothing of LoRA: they are about the kernel they are given.
    """

    def linear(self, layer: keras.layers.Layer, inputs: tf.Tensor, kernel: tf.Tensor) -> tf.Tensor:
        """Returns what the layer computes from a kernel, without bias and activation.

        Args:
            layer: The layer, for its settings.
            inputs: As `forward` saves them.
            kernel: A tensor of the shape of the layer's kernel; its last axis, which is that of
                the outputs, may have any size.
        """
        raise NotImplementedError

    def kernel_factor(
        self, layer: keras.layers.Layer, inputs: tf.Tensor, g: tf.Tensor, shape: tuple[int, ...]
    ) -> Factor:
        """Returns the gradients of `linear` by the kernel, one for each example.

        Args:
            layer: The layer, for its settings.
            inputs: As for `linear`.
            g: The gradient of the summed losses by what `linear` returned, float32 or float64.
            shape: The shape of the kernel.
        """
        raise NotImplementedError


class ProductRule(LinearRule):
    """Dense and EinsumDense: a product with a kernel, plus a bias. A kernel in int8 is frozen."""

    knows_int8 = True

    def lora_factors(
        self, layer: keras.layers.Layer, x: tf.Tensor, g: tf.Tensor
    ) -> list[tuple[keras.Variable, Factor]]:
        """Returns the gradients of LoRA's two factors.

        Args:
            layer: The layer, whose LoRA is enabled.
            x: The inputs, of the dtype of `g`.
            g: The gradient of the summed losses by the product.
        """
        raise NotImplementedError

    def forward(self, layer: keras.layers.Layer, inputs: tf.Tensor) -> tuple[tf.Tensor, Any]:
        """Returns the product plus the bias, and the inputs for the gradients."""
        if layer.quantization_mode is not None:
            return quantized_outputs(layer, inputs), inputs
        outputs = self.linear(layer, inputs, constant(layer.kernel))
        if layer.bias is not None:
            outputs = keras.ops.add(outputs, constant(layer.bias))
        return outputs, inputs

    def gradients(
        self, layer: keras.layers.Layer, saved: Any, g: tf.Tensor
    ) -> Sequence[tuple[keras.Variable, Factor]]:
        """Returns the gradients of the kernel, or of LoRA's two factors, and of the bias."""
        x = tf.cast(saved, g.dtype)
        found: list[tuple[keras.Variable, Factor]] = []
        if layer.lora_enabled:
            found = self.lora_factors(layer, x, g)
        elif layer.quantization_mode is None:
            kernel = kernel_of(layer)
            found = [(kernel, self.kernel_factor(layer, x, g, tuple(kernel.shape)))]
        if layer.bias is not None:
            found.append((layer.bias, Rows(sum_to(g, tuple(layer.bias.shape)))))
        return found


class DenseRule(ProductRule):
    """Dense on (batch, ..., in)."""

    def linear(self, layer: keras.layers.Layer, inputs: tf.Tensor, kernel: tf.Tensor) -> tf.Tensor:
        """Returns x W."""
        return keras.ops.matmul(inputs, kernel)

    def kernel_factor(
        self, layer: keras.layers.Layer, inputs: tf.Tensor, g: tf.Tensor, shape: tuple[int, ...]
    ) -> Factor:
        """Returns x'g."""
        return matrix(tf.cast(inputs, g.dtype), g)

    def lora_factors(
        self, layer: keras.layers.Layer, x: tf.Tensor, g: tf.Tensor
    ) -> list[tuple[keras.Variable, Factor]]:
        """Returns the gradients of A and B."""
        # Outputs are x (W + s A B): A sees g B', B sees x A.
        a, b = layer.lora_kernel_a, layer.lora_kernel_b
        scaled = lora_scale(layer) * g
        return [
            (a, matrix(x, tf.matmul(scaled, wide(b, g), transpose_b=True))),
            (b, matrix(tf.matmul(x, wide(a, g)), scaled)),
        ]


def matrix(x: tf.Tensor, g: tf.Tensor) -> Outer:
    """Returns the gradients x'g of a matrix W in y = x W.

    Args:
        x: Shape (batch, ..., in).
        g: Shape (batch, ..., out), the gradient by y.
    """
    return Outer(positions(x), positions(g), Layout((x.shape[-1], g.shape[-1])))
