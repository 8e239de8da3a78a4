"""Examples that stay where they are, on disk or elsewhere: only the rows of a batch are read."""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Callable, Iterator
from typing import Any, Protocol

import numpy as np
import tensorflow as tf

from keras_bandmf.sampling.sources import (
    checked_columns,
    map_leaves,
    preprocessed,
    refuse_strings,
)
from keras_bandmf.sampling.stores.base import Store, checked_indices
from keras_bandmf.sampling.stores.memory import add_arrays, spec_of
from keras_bandmf.sampling.stores.workers import OpenReaders, Reader, Workers
from keras_bandmf.sampling.weights import weighted

#: How many rows the digest reads.
DIGEST_ROWS = 1024
_DIGEST_CHUNK = 64


class Source(Protocol):
    """Where the rows of a `RandomAccessStore` come from."""

    def check_length(self) -> None:
        """Refuses a source whose number of rows is not, or no longer, that of the plan."""

    def read(self, indices: np.ndarray, workers: Workers) -> dict[str, Any]:
        """Returns rows as they are in the source: structures of new arrays."""

    def in_memory(self) -> dict[str, Any]:
        """Returns what of the columns is in memory, of which the digest takes every byte."""


class RandomAccessStore(Store):
    """Rows that are read when they are drawn.

    Formal guarantees:
        * `rows` reads the rows that are asked for, and no others. They get the same checks as
          data in memory, and the same dtypes: a row that is not finite in its weight, of another
          shape or dtype, or that cannot be read, is an error before any row is returned.
        * `preprocess` gets one row at a time, so that no row that it returns holds another. (When
          the store is made it is tried on two rows at once, to refuse one that would mix them.)
        * The number of rows is compared with `num_examples` when the store is made and whenever a
          reader is opened.
        * `digest` depends on the number of rows, on names, shapes and dtypes, on every byte of
          the columns that are in memory, and on the rows at `DIGEST_ROWS` = 1,024 positions. With
          at most 1,024 rows these are all rows. Otherwise a pseudorandom function of the key
          chooses them, independently and uniformly up to a total variation of
          `1024 num_examples 2^-64`, and a change of the values at a share f of the positions,
          made without knowing the key, leaves the digest the same with probability at most
          `(1 - f)^1024` (plus that variation and 2^-128): 3.4e-5 for f = 1 %, and 0.36 for
          f = 0.1 %. A shuffled source, and one with a row more or less in the middle, changes
          nearly all positions and is found. Two rows that changed places in a large source are
          most likely not.

    Args:
        source: Where rows come from.
        num_examples: Number of rows.
        class_weight: See `PrivateBatches`; as the following, applied to the rows of each batch.
        preprocess: See `PrivateBatches`.
        workers: How many threads read for an iterator.

    Raises:
        TypeError: The data or an argument has the wrong type.
        ValueError: The number of rows is not `num_examples`, or a value is out of range.
    """

    def __init__(
        self,
        source: Source,
        num_examples: int,
        class_weight: dict[int, float] | None,
        preprocess: Callable[..., Any] | None,
        workers: int,
    ):
        self._source = source
        self._num_examples = num_examples
        self._class_weight, self._preprocess = class_weight, preprocess
        self._num_workers = workers
        self._readers = OpenReaders()
        ends = np.array([0, num_examples - 1])
        columns = source.read(ends, Workers(1))
        self._spec = spec_of(self._finished(columns, len(ends), check=True))

    @property
    def num_examples(self) -> int:
        """The number of rows."""
        return self._num_examples

    def spec(self) -> dict[str, Any]:
        """Returns the `tf.TensorSpec`s of the columns, with None for the number of rows.

        Raises:
            TypeError: The rows are raw, and strings.
        """
        return refuse_strings(dict(self._spec))

    def raw_spec(self) -> dict[str, Any] | None:
        """Returns the specs of rows as they were given; see `Store.raw_spec`."""
        return dict(self._spec) if self._preprocess is None else None

    def preprocessed_by(self, preprocess: Callable[..., Any]) -> Store:
        """Returns a store of raw rows after `preprocess`; see `Store.preprocessed_by`."""
        if self._preprocess is not None:
            return self
        return RandomAccessStore(
            self._source, self._num_examples, self._class_weight, preprocess, self._num_workers
        )

    def rows(self, indices: np.ndarray) -> dict[str, Any]:
        """Returns copies of rows; see `Store.rows`."""
        with self._workers() as workers:
            return self._rows(indices, workers)

    @contextlib.contextmanager
    def reader(self) -> Iterator[Store]:
        """Yields a store for one iterator, whose threads end with the context.

        Raises:
            ValueError: The source has another number of rows than it had.
        """
        with self._workers() as workers:
            yield Reader(self, self._rows, workers)

    @contextlib.contextmanager
    def closing_readers(self) -> Iterator[None]:
        """Closes at its end every reader that was opened within, whoever still refers to it."""
        with self._readers.closing():
            yield

    def digest(self, key: bytes) -> bytes:
        """Returns a keyed BLAKE2b hash of some rows, and of what is in memory.

        Args:
            key: At most 64 bytes.

        Returns:
            32 bytes; the formal guarantees of the class say what they depend on.
        """
        hasher = hashlib.blake2b(key=key, digest_size=32)
        hasher.update(f"sampled rows of {self._num_examples} {self._spec}".encode())
        positions = digest_positions(key, self._num_examples)
        with self._workers() as workers:
            for start in range(0, len(positions), _DIGEST_CHUNK):
                chunk = positions[start : start + _DIGEST_CHUNK]
                add_arrays(hasher, self._rows(chunk, workers))
        add_arrays(hasher, self._source.in_memory())
        return hasher.digest()

    @contextlib.contextmanager
    def _workers(self) -> Iterator[Workers]:
        self._source.check_length()
        with self._readers.workers(self._num_workers) as workers:
            yield workers

    def _rows(self, indices: np.ndarray, workers: Workers) -> dict[str, Any]:
        indices = checked_indices(indices, self._num_examples)
        self.spec()
        if not len(indices):
            return self._no_rows()
        columns = self._finished(self._source.read(indices, workers), len(indices))
        self._check_spec(columns)
        return columns

    def _no_rows(self) -> dict[str, Any]:
        def empty(spec: tf.TensorSpec, name: str) -> np.ndarray:
            return np.empty((0, *spec.shape[1:]), spec.dtype.as_numpy_dtype)

        return {name: map_leaves(empty, column, name) for name, column in self._spec.items()}

    def _finished(self, columns: dict[str, Any], rows: int, check: bool = False) -> dict[str, Any]:
        """Does to the rows of a batch what `MemoryStore.read` does to all rows."""
        columns = checked_columns(columns, rows)
        if self._preprocess is not None:
            # One row at a time: nothing checks in each step that the rows of a batch do not mix.
            size = None if check else 1
            columns = checked_columns(preprocessed(columns, self._preprocess, check, size), rows)
            refuse_strings(spec_of(columns))
        return weighted(columns, self._class_weight)

    def _check_spec(self, columns: dict[str, Any]) -> None:
        """Refuses rows that `preprocess` gave another form than the first rows."""
        found = spec_of(columns)
        if found != self._spec:
            raise ValueError(
                "Expected all rows to have one shape and dtype, after `preprocess`. Received: "
                f"{found}, and {self._spec} for the first row. Pad to a fixed length."
            )


def digest_positions(key: bytes, num_examples: int) -> np.ndarray:
    """Returns the increasing row numbers whose rows a digest reads.

    Args:
        key: At most 64 bytes.
        num_examples: N.

    Returns:
        All rows where there are at most `DIGEST_ROWS`; else (DIGEST_ROWS,) int64, drawn with
        replacement by words that depend on the key alone.
    """
    if num_examples <= DIGEST_ROWS:
        return np.arange(num_examples)
    seed = hashlib.blake2b(key=key, digest_size=16, person=b"digest positions").digest()
    bits = np.random.Philox(key=np.frombuffer(seed, "<u8").astype(np.uint64))
    words = bits.random_raw(DIGEST_ROWS) % np.uint64(num_examples)
    return np.sort(words.astype(np.int64))
