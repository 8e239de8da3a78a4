"""The private names of Keras and TensorFlow that the library uses. No other file names one.

A private name can change in any release, so `tests/test_keras_internals.py` has a test for each
function, and a newer Keras than the tested ones is reported when this module is imported.
"""

from __future__ import annotations

import re
import sys
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import keras
import tensorflow as tf
from keras.src.backend import compute_output_spec
from keras.src.backend.common.global_state import get_global_attribute
from keras.src.losses.losses import LossFunctionWrapper
from keras.src.models.functional import Functional
from keras.src.ops import core, linalg, nn
from keras.src.ops import math as math_operations
from keras.src.ops import numpy as numpy_operations
from keras.src.random import seed_generator
from keras.src.trainers.compile_utils import CompileLoss
from keras.src.trainers.data_adapters import get_data_adapter
from tensorflow.python.framework import op_def_registry
from tensorflow.python.ops import control_flow_util

#: The newest version of Keras that the tests run on: major and minor.
NEWEST_TESTED_KERAS = (3, 15)


def warn_if_untested(version: str) -> None:
    """Warns if a version of Keras is newer than the newest one that the tests run on.

    Args:
        version: The version of Keras, such as "3.15.1" or "3.16.0.dev2026010103".
    """
    release = tuple(int(part) for part in re.findall(r"\d+", version)[:2])
    if release > NEWEST_TESTED_KERAS:
        newest = ".".join(map(str, NEWEST_TESTED_KERAS))
        warnings.warn(
            f"keras_bandmf is tested with Keras up to {newest}, and uses private names of Keras "
            f"that may have changed since. Received: Keras {version}. Install a tested version, "
            "or run `python -m pytest tests/test_keras_internals.py` of keras_bandmf first.",
            stacklevel=2,
        )


warn_if_untested(keras.__version__)


# Distribution and compilation (used by the shared ground and noise).


def in_multi_worker_mode(distribution: tf.distribute.Strategy) -> bool:
    """Returns whether a (multi-worker) mirrored strategy runs in several worker processes."""
    return bool(distribution.extended._in_multi_worker_mode())


def inside_xla_program() -> bool:
    """Returns whether the graph that is being traced, or one around it, is compiled by XLA."""
    graph = tf.compat.v1.get_default_graph()
    return bool(control_flow_util.GraphOrParentsInXlaContext(graph))


# Training (used by optimizers and training).


def build_model(model: keras.Model, data_batch: Any) -> None:
    """Builds a compiled model with its metrics, loss and optimizer, without running it.

    Args:
        model: The model.
        data_batch: `(x, y, sample_weight)` of `keras.KerasTensor`s; the last two may be None.
    """
    model._symbolic_build(data_batch=data_batch)


def attributes_without_build_in_fit() -> dict[str, Callable[..., None]]:
    """Returns what to set on a model so that `fit` does not build it from its first batch."""
    return {"_maybe_symbolic_build": lambda *args, **kwargs: None}


def optimized_variables(optimizer: keras.optimizers.Optimizer) -> list[keras.Variable]:
    """Returns the variables of the model that an optimizer was built with, in their order."""
    return optimizer._trainable_variables


def own_variables(optimizer: keras.optimizers.Optimizer) -> list[keras.Variable]:
    """Returns the variables that the base class of an optimizer keeps, such as its counter.

    `optimizer.variables` is the public name. This one is for a class that overrides it.
    """
    return optimizer._variables


def adam_moments(
    optimizer: keras.optimizers.Adam, variable: keras.Variable
) -> tuple[keras.Variable, keras.Variable]:
    """Returns the first and the second moment that Adam keeps of the gradients of a variable.

    Args:
        optimizer: The optimizer, which is built.
        variable: A variable that it was built with, as `update_step` gets it.
    """
    index = optimizer._get_variable_index(variable)
    return optimizer._momentums[index], optimizer._velocities[index]


class CheckpointHooks:
    """A base class whose two methods are called when `tf.train.Checkpoint` saves and restores.

    It comes first among the base classes, before that of TensorFlow or Keras.
    """

    def _checkpoint_tensors(self) -> dict[str, tf.Tensor]:
        """Returns the tensors to save. A SavedModel calls it while a graph is traced."""
        raise NotImplementedError

    def _restore_checkpoint_tensors(self, tensors: Mapping[str, tf.Tensor]) -> None:
        """Takes over the tensors that `_checkpoint_tensors` returned in an earlier process."""
        raise NotImplementedError

    def _serialize_to_tensors(self) -> dict[str, tf.Tensor]:
        return self._checkpoint_tensors()

    def _restore_from_tensors(self, restored_tensors: Mapping[str, tf.Tensor]) -> None:
        self._restore_checkpoint_tensors(restored_tensors)


# Layers and models (used by clipping and rgp).

#: The class of models that are a graph of layers and operations.
FunctionalModel = Functional

#: The method that runs such a graph: `(inputs, operation_fn=..., call_fn=...)`.
RUN_GRAPH = "_run_through_graph"

#: What a subclass of a functional or sequential model must not redefine, if its graph is what runs.
METHODS_BEFORE_THE_GRAPH = frozenset(
    {
        "__call__",
        "call",
        "operations",
        "_adjust_input_rank",
        "_convert_inputs_to_tensors",
        "_standardize_inputs",
        "compute_mask",
        RUN_GRAPH,
    }
)


def trained_layers(model: keras.layers.Layer) -> list[keras.layers.Layer]:
    """Returns the layers that own a trainable variable of `model`: the only ones that cost time."""
    trainable = {id(variable) for variable in model.trainable_variables}
    return [
        layer
        for layer in all_layers(model)
        if any(id(variable) in trainable for variable in own_trainable_variables(layer))
    ]


def all_layers(layer: keras.layers.Layer, include_self: bool = True) -> list[keras.layers.Layer]:
    """Returns a layer or model and every layer inside it, at any depth, each once."""
    return list(layer._flatten_layers(include_self=include_self))


def inner_layers(layer: keras.layers.Layer) -> list[Any]:
    """Returns what a layer holds directly, in the order of its attributes, lists and dicts too.

    Other tracked objects than layers may be among them.
    """
    return layer._layers


def own_trainable_variables(layer: keras.layers.Layer) -> list[keras.Variable]:
    """Returns the trainable variables that a layer made itself, whether or not it is frozen."""
    return layer._trainable_variables


def own_weights(layer: keras.layers.Layer) -> list[keras.Variable]:
    """Returns all variables that a layer made itself, those of its inner layers left out."""
    return [*layer._trainable_variables, *layer._non_trainable_variables]


def own_metrics(layer: keras.layers.Layer) -> list[keras.metrics.Metric]:
    """Returns the metrics that are attributes of a layer."""
    return layer._metrics


def own_seed_generators(layer: keras.layers.Layer) -> list[keras.random.SeedGenerator]:
    """Returns the seed generators that are attributes of a layer."""
    return layer._seed_generators


def global_seed_generator() -> keras.random.SeedGenerator:
    """Returns the generator that `seed=None` stands for, and makes it on first use.

    Raises:
        RuntimeError: If it does not exist yet and cannot be made here.
    """
    return seed_generator.global_seed_generator()


def existing_global_seed_generator() -> keras.random.SeedGenerator | None:
    """Returns the generator that `seed=None` stands for, or None if it was not made yet."""
    return get_global_attribute("global_seed_generator")


def added_losses(layer: keras.layers.Layer) -> list[tf.Tensor]:
    """Returns the losses that a layer passed to `add_loss` in its last call."""
    return layer._losses


def takes_training(layer: keras.layers.Layer) -> bool:
    """Returns whether the `call` of a layer or model has an argument `training`."""
    return layer._call_has_training_arg


def recomputes_activations(layer: keras.layers.Layer) -> bool:
    """Returns whether a layer was made in a `keras.RematScope`."""
    return bool(getattr(layer, "_remat_mode", None))


def keeps_its_message(kind: type) -> type:
    """Makes Keras leave the message of an exception as it is where a layer's `call` raises it.

    It is a decorator of exception classes. Keras adds the arguments of the call otherwise.
    """
    kind._keras_call_info_injected = True  # type: ignore[attr-defined]
    return kind


def stored_value(variable: keras.Variable) -> tf.Tensor:
    """Returns the value of a variable as it is stored, whatever dtype layers compute in."""
    return tf.convert_to_tensor(variable._value)


def kernel_of(layer: keras.layers.Layer) -> keras.Variable:
    """Returns the variable behind `layer.kernel`, which may be its sum with LoRA's product."""
    return layer._kernel


def table_of(layer: keras.layers.Layer) -> keras.Variable:
    """Returns the variable behind `layer.embeddings`, which may be its sum with LoRA's product."""
    return layer._embeddings


def attention_axes_of(layer: keras.layers.Layer) -> Sequence[int] | None:
    """Returns the axes that a layer attends over, or None if it has or was given none."""
    return getattr(layer, "_attention_axes", None)


class MaskedLMHeadParts:
    """The layers and variables of a `MaskedLMHead` of keras_hub.

    Attributes:
        dense: The layer that is applied first.
        layer_norm: The layer that is applied to its outputs.
        bias: The variable that is added to the logits.
    """

    def __init__(self, layer: keras.layers.Layer):
        self.dense: keras.layers.Layer = layer._intermediate_dense
        self.layer_norm: keras.layers.Layer = layer._intermediate_layer_norm
        self.bias: keras.Variable = layer._bias


def t5_bucket(layer: keras.layers.Layer, distances: tf.Tensor) -> tf.Tensor:
    """Returns the rows of its table that a `T5MultiHeadAttention` of keras_hub reads.

    Args:
        layer: The layer.
        distances: Integers: the position of the key minus that of the query.
    """
    return type(layer)._relative_position_bucket(
        distances,
        bidirectional=not layer.is_decoder,
        num_buckets=layer.relative_attention_buckets,
        max_distance=layer.relative_attention_max_distance,
    )


def keras_mask(tensor: Any) -> Any:
    """Returns the mask that Keras attached to a tensor, or None."""
    return getattr(tensor, "_keras_mask", None)


def set_keras_mask(tensor: Any, mask: Any) -> None:
    """Attaches a mask to a tensor, as Keras's layers do."""
    tensor._keras_mask = mask


def keras_logits(tensor: Any) -> Any:
    """Returns the logits that Keras attached to probabilities, or None."""
    return getattr(tensor, "_keras_logits", None)


def set_keras_logits(tensor: Any, logits: Any) -> None:
    """Attaches logits to probabilities, as Keras's activation functions do."""
    tensor._keras_logits = logits


def compiled_loss(model: keras.Model) -> CompileLoss | None:
    """Returns the loss that `compile` made from its arguments, or None before `compile`."""
    return getattr(model, "_compile_loss", None)


def compiled_metrics(model: keras.Model) -> Any:
    """Returns the metrics that `compile` made from its arguments, or None without any."""
    return getattr(model, "_compile_metrics", None)


def loss_tracker(model: keras.Model) -> keras.metrics.Mean:
    """Returns the metric of a compiled model that becomes `"loss"` in its logs."""
    return model._loss_tracker


def traced_symbolically(function: Callable[..., Any], *data: Any) -> Any:
    """Calls a function with tensors that have no values, in which new variables can be made.

    Args:
        function: A function of as many structures of tensors.
        *data: Structures of tensors; None stays None. Their shapes and dtypes are used, with any
            number of rows.

    Returns:
        What `function` returns, as a structure of `keras.KerasTensor`s.
    """

    def symbol(t: Any) -> keras.KerasTensor | None:
        if t is None:
            return None
        return keras.KerasTensor((None, *t.shape[1:]), keras.backend.standardize_dtype(t.dtype))

    return compute_output_spec(function, *(keras.tree.map_structure(symbol, d) for d in data))


def resolved_loss(loss: Any) -> CompileLoss:
    """Returns a loss as `compile(loss=loss)` would resolve it: a function (y_true, y_pred)."""
    return CompileLoss(loss)


def only_loss(compiled: CompileLoss, y: Any, y_pred: Any) -> keras.losses.Loss | None:
    """Returns what `compile` made of the loss of a model with one output; None if it is weighted.

    Args:
        compiled: What `compiled_loss` or `resolved_loss` returned.
        y: A tensor of targets.
        y_pred: A tensor of outputs.
    """
    if type(compiled) is not CompileLoss or keras.tree.is_nested(compiled._user_loss):
        return None
    if not compiled.built:  # as on its first call; a single loss makes no variable
        compiled.build(y, y_pred)
    found = compiled._flat_losses
    if len(found) != 1:
        return None
    return found[0].loss if found[0].path == () and found[0].loss_weights is None else None


def function_of_loss(loss: Any) -> tuple[Callable[..., Any], dict[str, Any]] | None:
    """Returns what one of Keras's losses calls, a function (y_true, y_pred, **settings).

    Args:
        loss: A loss.

    Returns:
        The function and the settings; None if a class or an instance overrides how it is called.
    """
    kind = type(loss)
    if not isinstance(loss, LossFunctionWrapper) or {"call", "__call__"} & set(vars(loss)):
        return None
    if kind.call is not LossFunctionWrapper.call or kind.__call__ is not keras.losses.Loss.__call__:
        return None
    return loss.fn, dict(loss._fn_kwargs)


def loss_of_training_step(
    model: keras.Model, x: Any, y: Any, y_pred: Any, sample_weight: Any
) -> tf.Tensor:
    """Returns the loss as Keras's own `train_step` computes it, by `model.compute_loss`."""
    return model._compute_loss(x=x, y=y, y_pred=y_pred, sample_weight=sample_weight, training=True)


def graph_inside(model: keras.layers.Layer) -> Functional | None:
    """Returns the functional model that runs inside a `Sequential`, or None."""
    return getattr(model, "_functional", None)


def nodes_by_depth(graph: Functional) -> dict[int, list[Any]]:
    """Returns the calls in the graph of a functional model; those of the largest depth run first.

    Each has `operation`, `arguments`, `input_tensors`, `outputs` and `is_input`.
    """
    return graph._nodes_by_depth


def call_that_made(tensor: keras.KerasTensor) -> tuple[Any, Any]:
    """Returns the operation that made a symbolic tensor, and Keras's record of the call or None."""
    operation, index, _ = tensor._keras_history
    nodes = operation._inbound_nodes
    return operation, nodes[index] if nodes else None


def operation_classes(name: str) -> list[type]:
    """Returns the classes of `keras.ops` operations of a name, such as "Add"; perhaps none."""
    modules = (numpy_operations, nn, core, math_operations, linalg)
    return [getattr(module, name) for module in modules if hasattr(module, name)]


def operation_definition(kind: str) -> Any:
    """Returns TensorFlow's definition (`OpDef`) of a type of operation, or None."""
    return op_def_registry.get(kind)


# TensorFlow calls these stateless although they run Python, read files, gather what several calls
# bring, or draw random numbers.
_WRONGLY_STATELESS = frozenset(
    {
        "Batch",
        "BatchFunction",
        "FractionalAvgPool",
        "FractionalMaxPool",
        "KMC2ChainInitialization",
        "KmeansPlusPlusInitialization",
        "MatchingFiles",
        "PyFuncStateless",
        "ReadFile",
        "Unbatch",
        "UnbatchGrad",
    }
)


def wrongly_stateless(kind: str) -> bool:
    """Returns whether TensorFlow calls a type of operation stateless that is not.

    It may run Python, read a file or a data set, gather what several calls bring, or draw random
    numbers. The list was made by reading the names of the operations of TensorFlow 2.21.

    Args:
        kind: The type of an operation.
    """
    return kind in _WRONGLY_STATELESS or "Dataset" in kind or "Iterator" in kind


def is_stateful(kind: str) -> bool:
    """Returns whether a type of operation may read, keep or draw more than its inputs say.

    Formal guarantees: True for all that TensorFlow calls stateful, for unknown types, and for what
    it wrongly calls stateless (`wrongly_stateless`).

    Args:
        kind: The type of an operation.
    """
    definition = operation_definition(kind)
    return wrongly_stateless(kind) or definition is None or definition.is_stateful


def watched_variables(graph: tf.Graph) -> list[tf.Variable]:
    """Returns the variables that a graph has read so far, while it is traced; for messages only."""
    return list(getattr(graph, "_watched_variables", []))


# Data of `fit` (used by training).


def hub_preprocessing(model: keras.Model) -> Callable[..., Any] | None:
    """Returns what a task of keras_hub does to raw rows: a function of `(x, y, sample_weight)`.

    It returns `x`, `(x, y)` or `(x, y, sample_weight)`. None for other models, and for tasks whose
    `preprocessor` is None. keras_hub itself is not imported: a task exists only where it was.
    """
    module = sys.modules.get("keras_hub.src.utils.pipeline_model")
    task_class = getattr(module, "PipelineModel", None)
    if task_class is None or not isinstance(model, task_class):
        return None
    does_nothing = type(model).preprocess_samples is task_class.preprocess_samples
    if does_nothing or getattr(model, "preprocessor", model) is None:
        return None
    return model.preprocess_samples


def evaluated_dataset(data: Any, batch_size: int | None, steps: int | None) -> Any:
    """Returns the `tf.data.Dataset` of batches that Keras makes of `validation_data`.

    A data set that is distributed already stays what it is.

    Args:
        data: What `fit` takes as `validation_data`.
        batch_size: The rows of a batch of arrays; None for Keras's default.
        steps: The argument `validation_steps` of `fit`.

    Raises:
        ValueError: If Keras does not take such data. Other types of errors are possible.
    """
    x, y, sample_weight = keras.utils.unpack_x_y_sample_weight(data)
    adapter = get_data_adapter(
        x, y, sample_weight, batch_size=batch_size, steps_per_epoch=steps, shuffle=False
    )
    return adapter.get_tf_dataset()
