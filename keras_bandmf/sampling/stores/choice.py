"""Which store holds the data that a user passes."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from keras_bandmf._checks import checked_function, checked_int
from keras_bandmf.sampling.sources import leaves, lists_as_arrays
from keras_bandmf.sampling.stores.base import Store
from keras_bandmf.sampling.stores.columns import Columns, is_lazy
from keras_bandmf.sampling.stores.files import StoredRows
from keras_bandmf.sampling.stores.memory import MemoryStore
from keras_bandmf.sampling.stores.random_access import RandomAccessStore
from keras_bandmf.sampling.stores.rows import Rows
from keras_bandmf.sampling.stores.workers import default_workers

# Where the class is found that reads ArrayRecord files with several threads by itself. Other
# objects of these libraries call code of users.
_ARRAY_RECORD_MODULES = (
    "array_record.python.array_record_data_source",
    "grain.sources",
    "grain.python",
)


def open_store(
    x: Any,
    y: Any,
    sample_weight: Any,
    num_examples: int,
    class_weight: dict[int, float] | None = None,
    preprocess: Callable[..., Any] | None = None,
    decode: Callable[[Any], Any] | None = None,
    workers: int | None = None,
) -> Store:
    """Returns the store of what a user passed to `plan.batches`; see there for the arguments.

    Args:
        x: Arrays in memory or on disk, a `tf.data.Dataset`, or a source of rows.
        y: Targets, as `x`.
        sample_weight: Weights.
        num_examples: The number of rows that the plan was made for.
        class_weight: Dict of class number to weight.
        preprocess: Function of tensors of rows.
        decode: Function of an element of a source.
        workers: How many threads read for an iterator; None for the default.

    Returns:
        A `MemoryStore` where everything is in memory, or a `RandomAccessStore`.

    Raises:
        TypeError: The data or an argument has the wrong type.
        PrivacyError: A source or `decode` gives one array for several rows, or `__getitems__` of
            a source gives others than `__getitem__`.
        ValueError: The number of rows is not `num_examples`, or a value is out of range.
        RuntimeError: The first, middle or last row of a source cannot be read.
    """
    checked_function("decode", decode)
    if workers is not None:
        workers = checked_int("workers", workers, hint="None chooses the number of threads.")
    threads = workers or default_workers()
    _refuse_batches(x)
    if is_row_source(x):
        for name, given in (("y", y), ("sample_weight", sample_weight)):
            if given is not None:
                raise ValueError(
                    f"Expected `{name}` to be None when `x` is a source of rows. Received: {name} "
                    f"of type {type(given).__name__}. Let its elements, or `decode`, be (x, y) or "
                    "(x, y, sample_weight)."
                )
        if isinstance(x, StoredRows) and decode is None and x.columns is not None:
            columns = {"y": None, "sample_weight": None} | x.columns
            return open_store(
                **columns,
                num_examples=num_examples,
                class_weight=class_weight,
                preprocess=preprocess,
                workers=workers,
            )
        shared = (workers is not None and workers > 1) or _bears_threads(x)
        source = Rows(x, num_examples, decode, shared)
        return RandomAccessStore(source, num_examples, class_weight, preprocess, threads)
    if decode is not None:
        raise ValueError(
            "`decode` is for a source of rows, of which it gets one element at a time. Received: "
            f"decode={decode!r}, and x of type {type(x).__name__}. Use `preprocess=`, which gets "
            "tensors of rows."
        )
    x, y, sample_weight = (lists_as_arrays(part) for part in (x, y, sample_weight))
    columns = {"x": x, "y": y, "sample_weight": sample_weight}
    if any(is_lazy(leaf) for column in columns.values() for leaf in leaves(column)):
        arrays = Columns(columns, num_examples)
        return RandomAccessStore(arrays, num_examples, class_weight, preprocess, threads)
    return MemoryStore.read(x, y, sample_weight, num_examples, class_weight, preprocess)


def is_row_source(x: Any) -> bool:
    """Returns whether an object returns rows by their numbers, and is no array of them.

    Args:
        x: Anything.

    Returns:
        True for objects with `__len__` and `__getitem__` that are not arrays, structures of
        arrays, or strings.
    """
    if isinstance(x, (dict, tuple, list, str, bytes, tf.data.Dataset, keras.KerasTensor)):
        return False
    if isinstance(getattr(x, "dtype", None), (np.dtype, tf.DType)) or hasattr(x, "__array__"):
        return False
    if type(x).__module__.startswith(("scipy.sparse", "tensorflow.")):
        return False
    return hasattr(type(x), "__len__") and hasattr(type(x), "__getitem__")


def _bears_threads(x: Any) -> bool:
    """Returns whether a source is of a type that is known to bear several threads at a time."""
    modules = (sys.modules.get(name) for name in _ARRAY_RECORD_MODULES)
    known = [getattr(module, "ArrayRecordDataSource", None) for module in modules]
    return any(type(x) is kind for kind in (StoredRows, *known))


def _refuse_batches(x: Any) -> None:
    """Refuses objects that yield batches of their own."""
    if isinstance(x, keras.utils.PyDataset):
        raise TypeError(
            "Expected `x` to be a source of single rows, because the plan decides which rows are "
            f"in a batch. Received: x of type {type(x).__name__}, a PyDataset, which returns "
            "batches. Pass an object whose `__len__` is the number of rows and whose "
            "`__getitem__(i)` returns row i, or the arrays that the PyDataset reads."
        )
    if hasattr(x, "dataset") and hasattr(type(x), "__iter__") and not is_row_source(x):
        raise TypeError(
            "Expected `x` to be a source of single rows, because the plan decides which rows are "
            f"in a batch. Received: x of type {type(x).__name__}, which yields batches. Pass the "
            "data set that it loads from (`x.dataset`), if that has `__len__` and `__getitem__`."
        )
