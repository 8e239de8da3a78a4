"""Arrays that are not in memory: memory-mapped files, HDF5 and Zarr, read by their rows."""

from __future__ import annotations

import contextlib
import mmap
import os
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np

from keras_bandmf.sampling.sources import array_of_examples, map_leaves
from keras_bandmf.sampling.stores.base import gathered
from keras_bandmf.sampling.stores.workers import Turns, Workers

#: A smaller memory-mapped file is treated as an array in memory, and hashed as a whole.
MAPPED_BYTES = 1 << 28

# Libraries whose arrays NumPy would read as a whole.
_LIBRARIES = frozenset({"h5py", "zarr"})


def is_lazy(leaf: Any) -> bool:
    """Returns whether a leaf is an array of which only the rows that are drawn should be read.

    Args:
        leaf: What the user passed.

    Returns:
        True for memory-mapped files of at least `MAPPED_BYTES`, for arrays of HDF5 and Zarr, and
        for objects with `shape`, `dtype` and `__getitem__` that NumPy cannot read as a whole.
    """
    if isinstance(leaf, np.ma.MaskedArray):
        return False  # refused as an array in memory is; only its values would be read
    if isinstance(leaf, np.ndarray):
        return leaf.nbytes >= MAPPED_BYTES and _mapping(leaf) is not None
    if not (hasattr(leaf, "shape") and hasattr(leaf, "__getitem__")):
        return False
    if not isinstance(getattr(leaf, "dtype", None), np.dtype):
        return False
    module = type(leaf).__module__
    if module.startswith("scipy.sparse"):
        return False
    return module.partition(".")[0] in _LIBRARIES or not hasattr(leaf, "__array__")


def _mapping(array: np.ndarray) -> np.memmap | None:
    """Returns the memory-mapped file that an array is a view of."""
    found: np.memmap | None = None
    base: Any = array
    while isinstance(base, np.ndarray):
        if isinstance(base, np.memmap):
            found = base
        base = base.base
    return found


class Columns:
    """Columns of which some are arrays on disk.

    Formal guarantees: a row is read from each array by its own number. A row that the array
    returns in another shape or dtype than it declares is an error that names it.

    Args:
        columns: Dict of structures of arrays, as the user passed them.
        num_examples: The number of rows that each must have.

    Raises:
        TypeError: A leaf does not hold dense numbers or strings.
        ValueError: A leaf has another number of rows.
    """

    def __init__(self, columns: dict[str, Any], num_examples: int):
        self._num_examples = num_examples

        def column_of(leaf: Any, name: str) -> Any:
            if is_lazy(leaf):
                return _Column(leaf, name)
            return array_of_examples(leaf, name, num_examples)

        self._columns = {
            name: map_leaves(column_of, column, name)
            for name, column in columns.items()
            if column is not None
        }
        self.check_length()

    def check_length(self) -> None:
        """Refuses arrays whose number of rows is not, or no longer, that of the plan.

        Raises:
            ValueError: The number of rows is another one, or a file is shorter than its array.
        """

        def check(column: Any, name: str) -> None:
            if isinstance(column, _Column):
                column.check_length(self._num_examples)

        for name, column in self._columns.items():
            map_leaves(check, column, name)

    def in_memory(self) -> dict[str, Any]:
        """Returns the arrays that are in memory, by their names; strings as one array of bytes."""
        found: dict[str, Any] = {}

        def add(column: Any, name: str) -> None:
            if isinstance(column, np.ndarray):
                found[name] = _strings_as_bytes(column) if column.dtype == object else column

        for name, column in self._columns.items():
            map_leaves(add, column, name)
        return found

    def read(self, indices: np.ndarray, workers: Workers) -> dict[str, Any]:
        """Returns rows, in the order of their numbers in `indices`.

        Args:
            indices: (k,) int64.
            workers: The threads that read.

        Returns:
            Dict of structures of new arrays.

        Raises:
            TypeError: A row has another dtype than its array.
            ValueError: A row has another shape than its array.
            RuntimeError: A row cannot be read.
        """

        def gather(column: Any, name: str) -> np.ndarray:
            if isinstance(column, _Column):
                return column.read(indices, workers)
            return gathered(column, indices)

        return {name: map_leaves(gather, column, name) for name, column in self._columns.items()}


def _warn_of_scattered_rows(array: np.ndarray, name: str) -> None:
    """Warns of rows that lie scattered over the file, as in Fortran order."""
    steps = [abs(step) for step, size in zip(array.strides, array.shape, strict=True) if size > 1]
    if len(array) > 1 and len(steps) > 1 and 0 < steps[0] < max(steps):
        warnings.warn(
            f"`{name}` is a memory-mapped file in Fortran order: the values of one row lie "
            "scattered over the whole file, and to read a row is to read many pages. Write the "
            "file again in C order, with `np.ascontiguousarray` or "
            "`keras_bandmf.sources.convert`.",
            stacklevel=2,
        )


def _read_single_pages(mapping: np.memmap) -> None:
    """Tells the system not to read ahead, which random rows of 3 KiB make 500 times slower."""
    # No error where a system, or a mapping that was made in another way, takes no advice.
    base: Any = mapping.base
    if isinstance(base, mmap.mmap) and hasattr(mmap, "MADV_RANDOM"):
        with contextlib.suppress(OSError):
            base.madvise(mmap.MADV_RANDOM)


def _strings_as_bytes(strings: np.ndarray) -> np.ndarray:
    """Returns lengths and bytes of all strings, as one array."""
    lengths = np.array([len(string) for string in strings.flat], np.int64)
    return np.frombuffer(lengths.tobytes() + b"".join(strings.flat), np.uint8)


class _Column:
    """An array on disk."""

    def __init__(self, array: Any, name: str):
        self._array, self._name = array, name
        # Neither HDF5 nor unknown arrays gain by several threads, or are known to bear them.
        self._turns = Turns()
        self._mapping = _mapping(array) if isinstance(array, np.ndarray) else None
        if self._mapping is not None:
            _read_single_pages(self._mapping)
            _warn_of_scattered_rows(array, name)

    def check_length(self, num_examples: int) -> None:
        shape = tuple(self._array.shape)
        if not shape or shape[0] != num_examples:
            raise ValueError(
                f"Expected `{self._name}` to have {num_examples} rows, one for each example. "
                f"Received: {self._name}.shape={shape}. num_examples={num_examples} is a public "
                "constant of the plan and not taken from the data: make the plan for the number "
                "of rows you have, and do not change the array while it is in use."
            )
        mapping = self._mapping
        if mapping is None or mapping.filename is None:
            return
        with contextlib.suppress(FileNotFoundError):  # what is mapped outlives its name
            size = os.path.getsize(mapping.filename)
            if size < mapping.offset + mapping.nbytes:
                raise ValueError(
                    f"Expected the file of `{self._name}` to be as long as it was. Received: "
                    f"{size} bytes, of {mapping.offset + mapping.nbytes}. Restore the file."
                )

    def read(self, indices: np.ndarray, workers: Workers) -> np.ndarray:
        rows = np.empty((len(indices), *self._array.shape[1:]), self._array.dtype)
        if self._mapping is not None:

            def take(places: np.ndarray, go_on: Callable[[], None]) -> None:
                part = slice(places[0], places[-1] + 1)
                gathered(self._array, indices[part], rows[part])

            workers.each(take, workers.split(np.arange(len(indices))))
            return rows
        # In the order of the file, where neighbors are often read together.
        order = np.argsort(indices, kind="stable")
        with self._turns:
            if hasattr(self._array, "oindex"):
                self._read_together(indices[order], rows, order)
            else:
                for place in order.tolist():
                    self._read_one(int(indices[place]), rows, place)
        return rows

    def _read_together(self, indices: np.ndarray, rows: np.ndarray, places: np.ndarray) -> None:
        """Reads rows by one call, as Zarr can."""
        unique, back = np.unique(indices, return_inverse=True)
        try:
            found = np.asarray(self._array.oindex[unique])
        except Exception:
            # Read one by one, the row that fails is found, or none does.
            for place, number in zip(places.tolist(), indices.tolist(), strict=True):
                self._read_one(number, rows, place)
            return
        self._check(found, len(unique), f"rows {unique[0]} to {unique[-1]}")
        rows[places] = found[back.reshape(-1)]

    def _read_one(self, number: int, rows: np.ndarray, place: int) -> None:
        try:
            row = self._array[number]
        except Exception as error:
            raise RuntimeError(
                f"Row {number} of `{self._name}` cannot be read: {type(error).__name__}: {error}"
            ) from error
        if rows.dtype == object:  # strings
            rows[place] = row
            return
        row = self._as_declared(np.asarray(row))
        self._check(row[None], 1, f"row {number}")
        rows[place] = row

    def _as_declared(self, row: np.ndarray) -> np.ndarray:
        """Returns a single value in the width and byte order of its array, which NumPy forgets."""
        dtype = self._array.dtype
        same = row.dtype.kind == dtype.kind
        same = same and (dtype.kind in "SU" or row.dtype.itemsize == dtype.itemsize)
        if same and row.shape == () and np.can_cast(row.dtype, dtype, "safe"):
            return row.astype(dtype, copy=False)
        return row

    def _check(self, found: np.ndarray, count: int, which: str) -> None:
        shape, dtype = tuple(self._array.shape[1:]), self._array.dtype
        if found.shape != (count, *shape):
            raise ValueError(
                f"Expected {which} of `{self._name}` to have the shape {shape} that its array "
                f"declares. Received: {found.shape[1:]}."
            )
        if found.dtype != dtype:
            raise TypeError(
                f"Expected {which} of `{self._name}` to have the dtype {dtype} that its array "
                f"declares. Received: {found.dtype}."
            )
