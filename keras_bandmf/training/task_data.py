"""Raw rows given to a task of keras_hub: a private `fit` does to them what the task's own does."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import keras
import tensorflow as tf

from keras_bandmf._keras_internals import hub_preprocessing
from keras_bandmf.sampling import PrivateBatches
from keras_bandmf.sampling.sources import leaves, lists_as_arrays, map_leaves

_BATCH_SIZE = 32  # as in Keras

#: Turns `(x)`, `(x, y)` or `(x, y, sample_weight)` into what the model takes.
Preprocessing = Callable[..., Any]


def preprocessing_of(model: keras.Model, x: Any) -> Preprocessing | None:
    """Returns what a task does to rows before its model sees them.

    Args:
        model: The model.
        x: The inputs, or their specs.

    Returns:
        A function of `(x, y, sample_weight)`. None for a model that takes rows as they are, and for
        rows that were preprocessed: those that have a name for each input of the model.
    """
    preprocess = hub_preprocessing(model)
    if preprocess is None or (isinstance(x, dict) and set(x) == _input_names(model)):
        return None

    def explained(*columns: Any) -> Any:
        try:
            return preprocess(*columns)
        except Exception as error:
            raise ValueError(
                f"The preprocessor of the task {model.name!r} does not take these rows. Received: "
                f"{_described(columns)}. Pass what the task's own `fit` takes, or use "
                "`plan.batches(x, y, preprocess=...)` with a function of your own. For rows that "
                "are preprocessed already, set `model.preprocessor = None`. The preprocessor says: "
                f"{error}"
            ) from error

    return explained


def preprocess_batches(batches: PrivateBatches, model: keras.Model) -> None:
    """Turns the raw rows of batches into those that a task's model takes, one row at a time.

    Args:
        batches: The batches; those that were made with `preprocess` stay what they are.
        model: The model.

    Raises:
        TypeError: If the preprocessor returns something else than dense numbers.
        ValueError: If it does not take the rows, mixes them, or is random.
    """
    raw = batches.raw_spec()
    preprocess = None if raw is None else preprocessing_of(model, raw["x"])
    if preprocess is not None:
        batches.preprocessed_by(preprocess)


def refuse_raw_rows(model: keras.Model, x: Any) -> None:
    """Refuses raw rows in an order of the user's own, of which Keras makes the batches.

    Args:
        model: The model.
        x: The inputs of a few rows.

    Raises:
        ValueError: If a task would have to preprocess them.
    """
    if preprocessing_of(model, x) is not None:
        raise ValueError(
            "Data in an order of your own must be preprocessed before `fit`: a preprocessor that "
            "is given whole batches could mix their rows. Received: rows for the task "
            f"{model.name!r}, which has a preprocessor. Preprocess each row, then set "
            "`model.preprocessor = None`; or make a plan that draws its own batches."
        )


def plain_rows(model: keras.Model, *parts: Any) -> tuple[Any, ...]:
    """Returns rows in which a list of strings or numbers is an array, as tasks take it.

    Args:
        model: The model. For one that is no task, the parts are returned as they are.
        *parts: What `fit` takes as `x`, `y` and `sample_weight`.
    """
    return tuple(lists_as_arrays(part) for part in parts) if hub_preprocessing(model) else parts


def preprocessed_validation(
    model: keras.Model, validation_data: Any, batch_size: int | None
) -> Any:
    """Returns validation data that is preprocessed when it is read, as the task's own `fit` does.

    Args:
        model: The model.
        validation_data: What `fit` was given.
        batch_size: The rows of a batch.

    Returns:
        The same for a model that is no task, and for generators and the like, whose elements the
        task's own `fit` does not take either.
    """
    if hub_preprocessing(model) is None:
        return validation_data
    if isinstance(validation_data, tf.data.Dataset) or _is_grain_dataset(validation_data):
        return _mapped(model, validation_data)
    rows = lists_as_arrays(validation_data)
    x, y, sample_weight = keras.utils.unpack_x_y_sample_weight(rows)
    if not all(
        hasattr(leaf, "shape") for leaf in leaves((x, y, sample_weight)) if leaf is not None
    ):
        return validation_data
    preprocess = preprocessing_of(model, x)
    if preprocess is None:
        return rows
    return _RawRows((x, y, sample_weight), batch_size or _BATCH_SIZE, preprocess)


class _RawRows(keras.utils.PyDataset):
    """Batches of raw rows, preprocessed when they are read."""

    def __init__(self, rows: tuple[Any, Any, Any], batch_size: int, preprocess: Preprocessing):
        super().__init__()
        counts = sorted({int(leaf.shape[0]) for leaf in leaves(rows) if leaf is not None})
        if len(counts) != 1 or not counts[0]:
            raise ValueError(
                "Expected `validation_data` to have the same number of rows in x, y and "
                f"sample_weight, at least one. Received: arrays of {counts} rows."
            )
        self._rows, self._count = rows, counts[0]
        self._batch_size, self._preprocess = batch_size, preprocess

    def __len__(self) -> int:
        return math.ceil(self._count / self._batch_size)

    def __getitem__(self, index: int) -> tuple[Any, ...]:
        where = slice(index * self._batch_size, (index + 1) * self._batch_size)

        def cut(leaf: Any, _: str) -> Any:
            return None if leaf is None else tf.convert_to_tensor(leaf[where])

        batch = self._preprocess(*map_leaves(cut, self._rows, "validation_data"))
        return batch if isinstance(batch, tuple) else (batch,)


def _mapped(model: keras.Model, dataset: Any) -> Any:
    """Returns a data set of batches with the preprocessing of the task behind it."""

    def preprocessed(*element: Any) -> Any:
        columns = element[0] if len(element) == 1 else element
        x, y, sample_weight = keras.utils.unpack_x_y_sample_weight(columns)
        preprocess = preprocessing_of(model, x)
        return columns if preprocess is None else preprocess(x, y, sample_weight)

    if isinstance(dataset, tf.data.Dataset):
        return dataset.map(preprocessed, tf.data.AUTOTUNE).prefetch(tf.data.AUTOTUNE)
    return dataset.map(preprocessed)


def _is_grain_dataset(data: Any) -> bool:
    """Returns whether something is a data set of Grain that functions can be mapped over."""
    kinds = [f"{kind.__module__}.{kind.__name__}" for kind in type(data).__mro__]
    return any(
        kind.startswith("grain.") and kind.endswith((".MapDataset", ".IterDataset"))
        for kind in kinds
    )


def _input_names(model: keras.Model) -> set[str]:
    """Returns the names of the inputs of a functional model; none for others."""
    try:
        return {tensor.name for tensor in keras.tree.flatten(model.inputs)}
    except (AttributeError, ValueError):  # a subclassed model
        return set()


def _described(columns: Any) -> str:
    """Returns the shapes and dtypes of columns, and none of their values."""

    def spec(leaf: Any, _: str) -> Any:
        if not hasattr(leaf, "shape"):
            return type(leaf).__name__
        return f"{tf.as_dtype(leaf.dtype).name}{list(leaf.shape)}"

    given = [column for column in columns if column is not None]
    return ", ".join(str(map_leaves(spec, column, "")) for column in given)
