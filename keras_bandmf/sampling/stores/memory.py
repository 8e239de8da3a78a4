"""Examples that are held in memory, and gathered by row number."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from typing import Any

import numpy as np
import tensorflow as tf

from keras_bandmf.sampling.sources import (
    checked_columns,
    map_leaves,
    preprocessed,
    read_dataset,
    refuse_strings,
)
from keras_bandmf.sampling.stores.base import Store, checked_indices, gathered
from keras_bandmf.sampling.weights import weighted


class MemoryStore(Store):
    """The columns `x`, `y` and `sample_weight` of the data; an example is its row number.

    NumPy arrays are kept, not copied, unless their type or layout has to change.

    Args:
        columns: Dict of structures of arrays with `num_examples` rows each.
        num_examples: Number of rows.
        raw: Whether they are as the user passed them: no `preprocess` was given.
    """

    def __init__(self, columns: dict[str, Any], num_examples: int, raw: bool = False):
        self._columns = columns
        self._num_examples = num_examples
        self._raw = raw

    @classmethod
    def read(
        cls,
        x: Any,
        y: Any,
        sample_weight: Any,
        num_examples: int,
        class_weight: dict[int, float] | None = None,
        preprocess: Callable[..., Any] | None = None,
    ) -> MemoryStore:
        """Reads, preprocesses and checks the examples; see `PrivateBatches` for the arguments.

        Raises:
            TypeError: The data or an argument has the wrong type.
            ValueError: The number of rows is not `num_examples`, or a value is out of range.
        """
        if isinstance(x, tf.data.Dataset):
            if y is not None or sample_weight is not None:
                name = "y" if y is not None else "sample_weight"
                raise ValueError(
                    f"Expected `{name}` to be None when `x` is a tf.data.Dataset. Received: {name} "
                    f"of type {type(y if y is not None else sample_weight).__name__}. Let the "
                    "dataset yield (x, y) or (x, y, sample_weight)."
                )
            columns = read_dataset(x, num_examples)
        else:
            columns = {"x": x, "y": y, "sample_weight": sample_weight}
        columns = checked_columns(columns, num_examples)
        if preprocess is not None:
            columns = checked_columns(preprocessed(columns, preprocess), num_examples)
            refuse_strings(spec_of(columns))
        return cls(weighted(columns, class_weight), num_examples, raw=preprocess is None)

    def raw_spec(self) -> dict[str, Any] | None:
        """Returns the specs of rows as they were given; see `Store.raw_spec`."""
        return spec_of(self._columns) if self._raw else None

    def preprocessed_by(self, preprocess: Callable[..., Any]) -> Store:
        """Returns a store of raw rows after `preprocess`; see `Store.preprocessed_by`."""
        if not self._raw:
            return self
        rows = self._num_examples
        columns = preprocessed(self._columns, preprocess, rows_at_a_time=1)
        columns = weighted(checked_columns(columns, rows), None)
        refuse_strings(spec_of(columns))
        return MemoryStore(columns, rows)

    @property
    def num_examples(self) -> int:
        """The number of rows."""
        return self._num_examples

    def rows(self, indices: np.ndarray) -> dict[str, Any]:
        """Returns copies of rows; see `Store.rows`."""
        indices = checked_indices(indices, self._num_examples)
        self.spec()
        return {
            name: map_leaves(lambda array, _: gathered(array, indices), column, name)
            for name, column in self._columns.items()
        }

    def digest(self, key: bytes) -> bytes:
        """Returns a keyed BLAKE2b hash of all columns, in the order of their rows.

        Args:
            key: At most 64 bytes.

        Returns:
            32 bytes.
        """
        self.spec()
        hasher = hashlib.blake2b(key=key, digest_size=32)
        add_arrays(hasher, self._columns)
        return hasher.digest()

    def spec(self) -> dict[str, Any]:
        """Returns the `tf.TensorSpec`s of the columns, with None for the number of rows.

        Raises:
            TypeError: The rows are raw, and strings.
        """
        return refuse_strings(spec_of(self._columns))


def add_arrays(hasher: Any, columns: dict[str, Any]) -> None:
    """Adds names, dtypes, shapes and bytes of columns to a hash, in the order of their rows.

    Args:
        hasher: A hash of `hashlib`.
        columns: Dict of structures of arrays.
    """

    def add(array: np.ndarray, name: str) -> np.ndarray:
        hasher.update(f"{name} {array.dtype.str} {array.shape}".encode())
        hasher.update(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)
        return array

    for name, column in columns.items():
        map_leaves(add, column, name)


def spec_of(columns: dict[str, Any]) -> dict[str, Any]:
    """Returns the `tf.TensorSpec`s of columns, with None for the number of rows."""

    def leaf_spec(array: np.ndarray, name: str) -> tf.TensorSpec:
        return tf.TensorSpec((None, *array.shape[1:]), tf.as_dtype(array.dtype))

    return {name: map_leaves(leaf_spec, column, name) for name, column in columns.items()}
