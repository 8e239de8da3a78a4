"""What batches ask of the examples of a run, wherever those are kept."""

from __future__ import annotations

import abc
import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np


class Store(abc.ABC):
    """The examples of a run, found by their numbers: an example is its row number.

    Formal guarantees: rows have the shapes and dtypes of `spec`, or there is an error. That a row
    has the same values each time is assumed of what is not in memory; `digest` of each store says
    how far that is checked when a run goes on.
    """

    @property
    @abc.abstractmethod
    def num_examples(self) -> int:
        """The number of rows."""

    @abc.abstractmethod
    def rows(self, indices: np.ndarray) -> dict[str, Any]:
        """Returns copies of rows.

        Args:
            indices: (k,) integers.

        Returns:
            Dict of the columns there are (`"x"`, `"y"`, `"sample_weight"`), as structures of new
            arrays of k rows.

        Raises:
            TypeError: `indices` is not a vector of integers.
            ValueError: A number is not that of a row.
        """

    @abc.abstractmethod
    def spec(self) -> dict[str, Any]:
        """Returns the `tf.TensorSpec`s of the columns, with None for the number of rows."""

    @abc.abstractmethod
    def digest(self, key: bytes) -> bytes:
        """Returns a keyed hash by which a run that goes on recognizes its rows.

        Args:
            key: At most 64 bytes.

        Returns:
            32 bytes, to be kept as secret as the key.
        """

    def raw_spec(self) -> dict[str, Any] | None:
        """Returns the specs of rows as they were given, strings too; None after a `preprocess`."""
        return None

    def preprocessed_by(self, preprocess: Callable[..., Any]) -> Store:
        """Returns a store of raw rows after `preprocess`, which gets one row at a time.

        Args:
            preprocess: See `PrivateBatches`.

        Returns:
            Another store, or this one where a `preprocess` was given.
        """
        return self

    @contextlib.contextmanager
    def reader(self) -> Iterator[Store]:
        """Yields this store for one iterator, with what that needs to read fast (threads)."""
        yield self

    @contextlib.contextmanager
    def closing_readers(self) -> Iterator[None]:
        """Closes at its end every reader that was opened within, whoever still refers to it."""
        yield


def gathered(array: np.ndarray, indices: np.ndarray, out: np.ndarray | None = None) -> np.ndarray:
    """Returns copies of rows of an array, and reads no others.

    Args:
        array: An array, or a view of a memory-mapped file.
        indices: (k,) int64, numbers of rows, already checked.
        out: Where to write them; None makes a new array.

    Returns:
        The rows.
    """
    if out is None:
        out = np.empty((len(indices), *array.shape[1:]), array.dtype)
    if array.flags.c_contiguous and array.flags.aligned:
        # The range was checked: "clip" only spares NumPy a buffer of the whole result.
        np.take(array, indices, axis=0, out=out, mode="clip")
    else:  # of which `take` would make a copy first, as a whole
        out[...] = array[indices]
    return out


def checked_indices(indices: np.ndarray, num_examples: int) -> np.ndarray:
    """Returns row numbers as int64.

    Args:
        indices: (k,) integers.
        num_examples: The number of rows there are.

    Returns:
        (k,) int64.

    Raises:
        TypeError: `indices` is not a vector of integers.
        ValueError: A number is not that of a row.
    """
    indices = np.asarray(indices)
    if indices.ndim != 1 or (indices.size and indices.dtype.kind not in "iu"):
        raise TypeError(
            "Expected `indices` to be a vector of integers. Received: "
            f"indices.shape={indices.shape}, indices.dtype={indices.dtype}."
        )
    indices = indices.astype(np.int64, copy=False)
    if indices.size and not 0 <= indices.min() <= indices.max() < num_examples:
        raise ValueError(
            f"Expected `indices` to lie in [0, {num_examples}). Received: indices from "
            f"{indices.min()} to {indices.max()}."
        )
    return indices
