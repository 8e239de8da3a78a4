"""Refuses models and arguments by looking at them, before anything runs."""

from __future__ import annotations

import os
from typing import Any, Literal

import keras
import tensorflow as tf

from keras_bandmf._checks import PrivacyError, checked_int
from keras_bandmf._environment import refuse_loose_arithmetic
from keras_bandmf._keras_internals import all_layers, compiled_loss
from keras_bandmf.clipping.checks.tiles import refuse_narrow_layers
from keras_bandmf.clipping.losses import overrides_compute_loss, with_mean_by_weight
from keras_bandmf.clipping.rowwise.known_layers import GROUP_OR_LAYER_NORM, replacement_of

# The options of grappler, and the environment variables that TensorFlow or oneDNN reads.
_MIXED = "auto_mixed_precision"
_MATH_MODES = (
    "TF_SET_ONEDNN_FPMATH_MODE",
    "ONEDNN_DEFAULT_FPMATH_MODE",
    "DNNL_DEFAULT_FPMATH_MODE",
)
# Read by NVIDIA's libraries: 0 forbids TensorFloat-32, 1 forces it.
_TF32_OVERRIDE = "NVIDIA_TF32_OVERRIDE"


def refuse_sparse_data(x: Any, y: Any, sample_weight: Any) -> None:
    """Refuses ragged or sparse data.

    Raises:
        ValueError: If there is any.
    """
    for name, part in (("x", x), ("y", y), ("sample_weight", sample_weight)):
        for leaf in keras.tree.flatten(part):
            if isinstance(leaf, (tf.RaggedTensor, tf.SparseTensor)):
                raise ValueError(
                    f"Expected `{name}` to be dense: a row of axis 0 is an example. Use "
                    "`.to_tensor()` or `tf.sparse.to_dense`, and a mask. "
                    f"Received: {name}={type(leaf).__name__}"
                )


def checked_microbatch_size(microbatch_size: Any) -> int | Literal["auto"] | None:
    """Returns None, "auto" or a positive integer.

    Raises:
        TypeError: If it is anything else.
        ValueError: If it is not positive.
    """
    if microbatch_size is None:
        return None
    if isinstance(microbatch_size, str) and microbatch_size == "auto":
        return "auto"
    hint = 'Or None for the whole batch, or "auto". It changes memory, never the result.'
    return checked_int("microbatch_size", microbatch_size, hint=hint)


def refuse_short_products() -> None:
    """Refuses settings under which float32 products may keep only 8 to 11 binary digits.

    What is left of terms that cancel is then far from the norm of what is summed, beyond what the
    floors of norms cover. These switches do that:

     * TensorFloat-32, NVIDIA's default since Ampere; `NVIDIA_TF32_OVERRIDE` of the environment
       turns it on whatever TensorFlow says (measured on an H100: products wrong by up to 3e-4);
     * grappler's mixed precision, for float16 on GPUs and for bfloat16 on CPUs, where a product
       in a graph was measured to be wrong by 0.3 % of the largest entry;
     * oneDNN's math mode, for bfloat16 on CPUs that have it: Arm's, and x86 CPUs with AMX, where
       convolutions were measured to change; one without AMX was measured to ignore it;
     * flags of XLA (`_environment.refuse_loose_arithmetic`).

    Raises:
        PrivacyError: If one of them is on.

    Formal guarantees: necessary conditions only. It reads TensorFlow's options and the
    environment of the process, which must not change after the first trace.
    """
    refuse_loose_arithmetic()
    _refuse_tensor_float()
    options = tf.config.optimizer.get_experimental_options()
    on = [name for name, value in options.items() if name.startswith(_MIXED) and value]
    if on:
        raise PrivacyError(
            "Norms of float32 gradients need float32 products: grappler's mixed precision computes "
            "them in 16 bits, so that they can be understated. Call "
            f"`tf.config.optimizer.set_experimental_options({{{on[0]!r}: False}})` first, and use "
            "Keras's bfloat16 policies where fewer digits are wanted. "
            f"Received: {', '.join(f'{name}={options[name]}' for name in on)}"
        )
    for name in _MATH_MODES:
        mode = os.environ.get(name, "")
        if mode.upper() not in ("", "STRICT"):
            raise PrivacyError(
                "Norms of float32 gradients need float32 products: oneDNN's math mode allows fewer "
                "digits, so that they can be understated. Unset the environment variable before "
                f"TensorFlow is imported. Received: {name}={mode}"
            )


def _refuse_tensor_float() -> None:
    override = os.environ.get(_TF32_OVERRIDE, "")
    forced = override.strip() not in ("", "0")
    if not forced and not tf.config.experimental.tensor_float_32_execution_enabled():
        return
    for device in tf.config.get_visible_devices("GPU"):
        details = tf.config.experimental.get_device_details(device)
        if details.get("compute_capability", (8, 0)) >= (8, 0):
            where = details.get("device_name", device.name)
            raise PrivacyError(
                "Norms of float32 gradients need float32 products: rounded as TensorFloat-32 they "
                "can be understated. "
                + (
                    "Unset the environment variable, which overrides what TensorFlow is told, "
                    f"before TensorFlow is imported. Received: {_TF32_OVERRIDE}={override} and "
                    if forced
                    else "Call `tf.config.experimental.enable_tensor_float_32_execution(False)` "
                    "first. Received: TensorFloat-32 enabled on "
                )
                + f"{where}"
            )


def refuse_model(model: keras.Model, sample_weight: Any = None, loss: Any = None) -> None:
    """Refuses a model whose per-example gradients do not exist or are not private.

    Raises:
        ValueError: If `model` is not a model of Keras 3.
        PrivacyError: If one of its layers or its loss is refused.

    Formal guarantees: necessary conditions only, those one can read off the layers; `check_model`
    tests the model's behavior.
    """
    if not isinstance(model, keras.Model):
        raise ValueError(
            "Expected `model` to be a Keras 3 `keras.Model` (`import keras`, not `tf.keras`, which "
            "`import tensorflow_transform` makes Keras 2). "
            f"Received: model of type {type(model).__module__}.{type(model).__name__}"
        )
    refuse_stateful(model)
    for layer in all_layers(model):
        _refuse_layer(layer)
    refuse_narrow_layers(model)
    if sample_weight is not None and with_mean_by_weight(model, loss):
        raise PrivacyError(
            'A loss with reduction="mean_with_sample_weight" divides by the sum of the weights, so '
            'the weight of a single example cancels. Use reduction="sum_over_batch_size", or drop '
            f"`sample_weight`. Received: loss={model.loss if loss is None else loss!r}"
        )
    if loss is None and overrides_compute_loss(model):
        regularized = [v.path for v in model.trainable_variables if v.regularizer is not None]
        if regularized:
            raise PrivacyError(
                f"{type(model).__name__} overrides `compute_loss` and has weight regularizers: "
                "they would be clipped with every example and added again after the noise. Remove "
                "the override (use `compile(loss=...)`) or the regularizers. "
                f"Received: regularizers on {', '.join(regularized)}"
            )


def _refuse_layer(layer: keras.layers.Layer) -> None:
    where = f"Received: layer '{layer.path}' of type {type(layer).__name__}"
    if layer.compute_dtype == "float16":
        raise PrivacyError(
            "float16 is refused: Keras skips whole steps by looking at the data (dynamic loss "
            'scaling), which no privacy statement covers. Use "mixed_bfloat16" or "float32", for '
            f'example keras.config.set_dtype_policy("mixed_bfloat16"). {where}'
        )
    if layer.compute_dtype == "bfloat16" and _may_use_cudnn(layer):
        raise PrivacyError(
            "On a GPU, cuDNN's backward pass of LSTM and GRU in bfloat16 reads memory that nothing "
            "wrote, so that a gradient may hold what other rows or steps left there. Make the "
            f'layer with `use_cudnn=False`, or with `dtype="float32"`. {where}'
        )
    if isinstance(layer, keras.layers.BatchNormalization) and layer.trainable:
        raise PrivacyError(
            "BatchNormalization mixes the examples of a batch, so no example has a gradient of its "
            f"own. Replace it by {GROUP_OR_LAYER_NORM}, or freeze it "
            f"(`layer.trainable = False`). {where}"
        )
    instead = replacement_of(layer)
    if instead is not None:
        raise PrivacyError(
            f"{type(layer).__name__} mixes the examples of a batch, so no example has a gradient "
            f"of its own. Use {instead}. {where}"
        )
    if isinstance(layer, keras.layers.SpectralNormalization):
        raise PrivacyError(
            "SpectralNormalization overwrites the kernel of its layer in each forward pass, past "
            "the optimizer: a private step may run several passes, and clips gradients by the "
            "kernel that it was given. Wrap no layer, and give the layer a constraint that is "
            "applied after each step, such as `kernel_constraint=keras.constraints.UnitNorm()`, or "
            "a `keras.constraints.Constraint` of your own that divides the kernel by its largest "
            f"singular value. {where}"
        )
    if getattr(layer, "activity_regularizer", None) is not None:
        raise PrivacyError(
            "`activity_regularizer` adds a loss that depends on the data of the whole batch. "
            f"Remove it; weight regularizers (`kernel_regularizer=`) are fine. {where}"
        )


def refuse_no_rows(model: keras.Model, x: Any, y: Any, sample_weight: Any, loss: Any) -> None:
    """Refuses data that is not arrays of as many rows each, or lacks targets.

    Args:
        model: The model.
        x: Its inputs.
        y: The targets.
        sample_weight: The weights.
        loss: None for the compiled loss.

    Raises:
        TypeError: If `x` holds no array, or a part holds something else.
        ValueError: If arrays have different numbers of rows, or there are no targets for a loss.
    """
    parts = {"x": x, "y": y, "sample_weight": sample_weight}
    rows: int | None = None
    for name, part in parts.items():
        found = [leaf for leaf in keras.tree.flatten(part) if leaf is not None]
        if name == "x" and not found:
            raise TypeError(f"Expected `x` to hold arrays or tensors. Received: x={x!r}.")
        for leaf in found:
            shape = getattr(leaf, "shape", None)
            if shape is None or getattr(shape, "rank", len(tuple(shape) or ())) == 0:
                raise TypeError(
                    f"Expected `{name}` to hold arrays or tensors with one row for each example. "
                    f"Received: {name} with {leaf!r}."
                )
            count = None if getattr(shape, "rank", 1) is None else shape[0]
            rows = count if rows is None else rows
            if None not in (count, rows) and count != rows:
                raise ValueError(
                    f"Expected `{name}` to have as many rows as `x`, {rows}. Received: {name} of "
                    f"shape {tuple(shape)}."
                )
    compares = loss is None and compiled_loss(model) is not None
    if y is None and compares and not overrides_compute_loss(model):
        raise ValueError(
            "Expected `y`, because the model was compiled with a loss that compares outputs with "
            "targets. Received: y=None."
        )


def refuse_stateful(layer: keras.layers.Layer) -> None:
    """Refuses a recurrent layer that keeps its state, which Keras can build for one size only.

    Args:
        layer: A layer, or a model with such layers.

    Raises:
        PrivacyError: If it, or a layer in it, has `stateful=True`.
    """
    for each in all_layers(layer):
        if getattr(each, "stateful", False):
            raise PrivacyError(
                "With `stateful=True` a layer carries the state of one batch into the next, past "
                "the noise. Make it with `stateful=False`. Received: layer "
                f"'{each.path or each.name}' of type {type(each).__name__}"
            )


def _may_use_cudnn(layer: keras.layers.Layer) -> bool:
    """Returns whether a layer may run on cuDNN.

    The fault was measured with TensorFlow 2.21 and cuDNN 9.19 on an H100, and not in float32.
    """
    recurrent = isinstance(layer, (keras.layers.LSTM, keras.layers.GRU))
    return recurrent and bool(layer.use_cudnn) and bool(tf.config.get_visible_devices("GPU"))
