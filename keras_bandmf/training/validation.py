"""Validation data is tried before the first step, so that a `fit` that fails spends no step."""

from __future__ import annotations

import itertools
import types
from collections.abc import Iterator, Sequence
from typing import Any

import keras
import tensorflow as tf

from keras_bandmf._checks import checked_int
from keras_bandmf._keras_internals import evaluated_dataset
from keras_bandmf.clipping.losses import no_replicas
from keras_bandmf.sampling import PrivateBatches
from keras_bandmf.training.regularizers import regularized_values
from keras_bandmf.training.task_data import preprocessed_validation


def checked_frequency(
    validation_data: Any,
    validation_steps: int | None,
    validation_batch_size: int | None,
    validation_freq: int | Sequence[int],
) -> int | list[int]:
    """Returns `validation_freq` as Keras takes it, and refuses what fails after the first epoch.

    Args:
        validation_data: The argument of `fit`, as are the others.
        validation_steps: None or a positive number.
        validation_batch_size: None or a positive number.
        validation_freq: A positive number, or a list of epochs.

    Returns:
        The frequency, as an `int` or a list of them: Keras takes no other sequence, nor NumPy's
        numbers.

    Raises:
        TypeError: If a value has the wrong type.
        ValueError: If one is out of range, or the data are batches of a plan.
    """
    parts = validation_data if isinstance(validation_data, (list, tuple)) else [validation_data]
    if any(isinstance(part, PrivateBatches) for part in parts):
        raise ValueError(
            "`validation_data` cannot be what `plan.batches` returns: the batches of a plan are "
            "for training, and no row of them is left out. Received: validation_data with "
            "PrivateBatches. Pass arrays `(x, y)` or a `tf.data.Dataset` of batches, of rows that "
            "are public or disjoint from the training data."
        )
    for name, value in (
        ("validation_steps", validation_steps),
        ("validation_batch_size", validation_batch_size),
    ):
        if value is not None:
            checked_int(name, value)
    if isinstance(validation_freq, (list, tuple, set)):
        hint = "A list holds the numbers of the epochs to validate after, from 1."
        return [checked_int("validation_freq", epoch, hint=hint) for epoch in validation_freq]
    return checked_int("validation_freq", validation_freq, hint="1 validates after each epoch.")


def evaluable(
    model: keras.Model, validation_data: Any, batch_size: int | None, steps: int | None
) -> Any:
    """Returns validation data that the model can evaluate, as far as that can be seen.

    Keras's evaluation of one batch is traced, and not run (with `run_eagerly`, a batch is
    evaluated). Neither weights nor metrics nor random seeds change.

    Args:
        model: The model, built and compiled.
        validation_data: The argument of `fit`.
        batch_size: The rows of a batch of arrays.
        steps: The argument `validation_steps` of `fit`.

    Returns:
        What to pass to Keras: the data itself; another generator that yields the same; or, for a
        task of keras_hub, the data behind the task's preprocessor.

    Raises:
        ValueError: If the data cannot be evaluated.
    """
    data, tried = validation_data, validation_data
    if isinstance(data, types.GeneratorType):
        first = next(data, None)
        if first is None:
            raise ValueError(
                "Expected `validation_data` to yield batches. Received: a generator at its end."
            )
        data, tried = (each for each in itertools.chain([first], data)), _of_one(first)
    try:
        data = preprocessed_validation(model, data, batch_size)
        if not isinstance(data, types.GeneratorType):
            tried = data
        dataset = evaluated_dataset(tried, batch_size, steps)
        if isinstance(dataset, tf.data.Dataset) and not _has_own_evaluation(model):
            _try(model, dataset)
    except Exception as error:
        raise ValueError(
            "`validation_data` cannot be evaluated. This was found before the first step, so that "
            "no step of the plan is spent. Received: validation_data of "
            f"{_described(validation_data)}. Pass `(x, y)` with arrays like those to train on, or "
            f"a `tf.data.Dataset` of such batches. {type(error).__name__}: {error}"
        ) from error
    return data


def _of_one(batch: Any) -> Iterator[Any]:
    """Returns a generator of one batch."""
    return (each for each in [batch])


def _has_own_evaluation(model: keras.Model) -> bool:
    """Returns whether `evaluate` is the user's, which may do anything to its data."""
    own = next(kind for kind in type(model).__mro__ if "evaluate" in vars(kind))
    return "evaluate" in vars(model) or not own.__module__.startswith(("keras.", "keras_hub."))


def _try(model: keras.Model, dataset: tf.data.Dataset) -> None:
    """Evaluates a batch for its shapes and types alone, and keeps nothing that it changes."""
    spec = dataset.element_spec
    as_in_keras = type(model).test_step is keras.Model.test_step and "test_step" not in vars(model)
    if as_in_keras and any(
        getattr(leaf, "dtype", None) == tf.string for leaf in keras.tree.flatten(spec)
    ):
        raise ValueError(
            "It holds strings, which must be turned into numbers like those to train on, for "
            "example by `dataset.map(preprocess)`."
        )
    try:
        with no_replicas(), keras.StatelessScope(regularized_values(model)):
            if model.run_eagerly:
                for batch in dataset.take(1):
                    model.test_step(batch)
            else:
                step = tf.function(lambda batch: model.test_step(batch), autograph=False)
                step.get_concrete_function(spec)
    except Exception as error:
        if as_in_keras and keras.utils.unpack_x_y_sample_weight(spec)[1] is None:
            raise ValueError("It has no targets: pass `(x, y)`.") from error
        raise


def _described(data: Any) -> str:
    """Returns the type of data, and the shapes and dtypes of arrays; none of their values."""

    def leaf(each: Any) -> str:
        if hasattr(each, "shape") and hasattr(each, "dtype"):
            return f"{each.dtype}{list(each.shape)}"
        return type(each).__name__

    if isinstance(data, tf.data.Dataset):
        return f"type {type(data).__name__} with elements {data.element_spec}"
    if isinstance(data, (tuple, list, dict)) and len(keras.tree.flatten(data)) <= 20:
        return str(keras.tree.map_structure(leaf, data))
    return f"type {type(data).__name__}"
