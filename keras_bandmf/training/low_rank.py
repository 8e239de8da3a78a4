"""What would train LoRA on noise alone: factors that a file set to zero, quantized logits."""

from __future__ import annotations

from collections.abc import Iterable

import keras

from keras_bandmf._keras_internals import all_layers, nodes_by_depth
from keras_bandmf.clipping.rowwise.decision import graph_of

# The factors A and B of W + s A B, by the names of Keras.
_FACTORS = (("lora_kernel_a", "lora_kernel_b"), ("lora_embeddings_a", "lora_embeddings_b"))
_IN_FILES = (
    "The files of Keras (`.keras`, `.weights.h5`) hold LoRA's product added to the kernel, and "
    "loading one sets both factors to zero."
)
_CHECKPOINT = (
    "`checkpoint = tf.train.Checkpoint(model=model, optimizer=model.optimizer)` and `manager = "
    'tf.train.CheckpointManager(checkpoint, "run", max_to_keep=1)`'
)
_RESTORE = (
    "`model.optimizer.build(model.trainable_variables)` and "
    "`checkpoint.restore(manager.latest_checkpoint)`"
)


def refuse_zero_factors(model: keras.Model) -> None:
    """Refuses to train LoRA from two factors that are zero, as they are after loading a file.

    The gradient of each factor is a product with the other one: nothing but noise would move them.

    Args:
        model: The built model.

    Raises:
        ValueError: If both factors of a layer are to be trained and zero.
    """
    zero = [
        layer.path
        for layer in all_layers(model)
        if (factors := _trained_factors(layer))
        and not any(keras.ops.convert_to_numpy(factor).any() for factor in factors)
    ]
    if zero:
        raise ValueError(
            "Expected LoRA to begin with a first factor that is not zero: while both are, neither "
            f"has a gradient, and steps would add nothing but noise. {_IN_FILES} Received: zeros "
            f"in {_named(zero)}. To train on from the loaded weights, draw the first factors anew: "
            "`[v.assign(keras.initializers.HeUniform()(v.shape)) for v in "
            'model.trainable_variables if v.name in ("lora_kernel_a", "lora_embeddings_a")]`. '
            f"To go on with the run that was interrupted, save it by {_CHECKPOINT}."
        )


def refuse_quantized_logits(model: keras.Model) -> None:
    """Refuses a quantized table of tokens that gives the logits of a functional model.

    Where Keras quantizes the inputs of such a table, it rounds them and gives the rounding no
    gradient: of each position only the largest entry gets one, through the scale.

    Args:
        model: The model.

    Raises:
        ValueError: If gradients would have to pass such a table.
    """
    graph = graph_of(model)
    nodes = nodes_by_depth(graph) if graph is not None else {}
    for node in (node for of_depth in nodes.values() for node in of_depth):
        table = node.operation
        if (
            node.arguments.kwargs.get("reverse")
            and getattr(table, "quantization_mode", None) is not None
            and getattr(table, "inputs_quantizer", None) is not None
        ):
            raise ValueError(
                "Keras has no usable gradient through a quantized table of tokens that also gives "
                "the logits: it rounds what comes in, and only the largest entry of each position "
                f"gets a gradient. Received: layer '{table.path}' quantized to "
                f"{table.quantization_mode}. Leave tables out: "
                f"`model.backbone.quantize({table.quantization_mode!r}, filters=lambda layer: not "
                "isinstance(layer, keras.layers.Embedding))`."
            )


def refuse_backup(model: keras.Model, callbacks: Iterable[keras.callbacks.Callback]) -> None:
    """Refuses `BackupAndRestore`, which cannot restore the factors of LoRA.

    Args:
        model: The model.
        callbacks: The callbacks of a `fit`.

    Raises:
        ValueError: If LoRA is trained and one of them is `BackupAndRestore`.
    """
    if not any(isinstance(each, keras.callbacks.BackupAndRestore) for each in callbacks):
        return
    trained = [layer.path for layer in all_layers(model) if _trained_factors(layer)]
    if trained:
        raise ValueError(
            f"BackupAndRestore cannot restore the training of LoRA. {_IN_FILES} Received: "
            f"BackupAndRestore for a model with LoRA in {_named(trained)}. Make {_CHECKPOINT}, "
            "and pass `callbacks=[keras.callbacks.LambdaCallback(on_epoch_end=lambda epoch, logs: "
            f"manager.save())]`. After a restart, call {_RESTORE} before `fit`."
        )


def _trained_factors(layer: keras.layers.Layer) -> list[keras.Variable]:
    """Returns the two factors of a layer, or nothing unless both are trained."""
    if not getattr(layer, "lora_enabled", False):
        return []
    trainable = {id(variable) for variable in layer.trainable_variables}
    for names in _FACTORS:
        factors = [getattr(layer, name, None) for name in names]
        if all(factor is not None and id(factor) in trainable for factor in factors):
            return factors
    return []


def _named(paths: list[str]) -> str:
    more = f" and {len(paths) - 1} more layers" if len(paths) > 1 else ""
    return f"layer '{paths[0]}'{more}"
