"""Rows in files that are found by their number: written once from a stream, then memory-mapped.

Plain `.npy` files, because the rows of a plan have one shape: a row is then found by multiplication
and copied without decoding. Random rows of 32 x 32 x 3 bytes from a warm cache, on two shared
cores: 1.7 to 2.2 million a second, where HDF5 (contiguous, one row a call) gave 85,000 and
ArrayRecord 37,000 to 47,000. They need nothing but NumPy, which reads them on every system and in
every version; ArrayRecord has no wheels for Windows. Byte strings of any length (records of a
TFRecord file, JPEGs) stand one after the other in one file, with the ends of all in another.
"""

from __future__ import annotations

import contextlib
import json
import os
import pathlib
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sized
from typing import Any, NamedTuple

import numpy as np
import tensorflow as tf

from keras_bandmf.sampling.sources import as_array, map_leaves, unpacked
from keras_bandmf.sampling.stores.rows import mapped, plain_array

_MANIFEST = "manifest.json"
_FORMAT = "keras_bandmf rows"
_VERSION = 1
_HEADER_BYTES = 256
_CHUNK_ROWS = 256


class ConversionProgress(NamedTuple):
    """The state of a conversion, as the `callback` of `sources.convert` receives it.

    Attributes:
        rows: How many rows were written so far.
        total: How many there will be; None if that is not known.
        done: Whether the file is complete.

    Example:
        >>> import keras_bandmf as bandmf
        >>> import os, tempfile
        >>> folder = tempfile.TemporaryDirectory()
        >>> reports = []
        >>> _ = bandmf.sources.convert(
        ...     range(300), os.path.join(folder.name, "rows"), callback=reports.append)
        >>> [report.rows for report in reports]
        [256, 300]
    """

    rows: int
    total: int | None
    done: bool


class StoredRows:
    """Rows that `sources.convert` wrote: what `sources.load` returns.

    Pass it to `plan.batches` as `x`. It has `__len__`, `__getitem__(i)` and `__getitems__(list)`,
    and is safe to read from several threads and after a fork.

    Formal guarantees: it is made only from a folder that was written to its end: the manifest is
    written last, the folder gets its name after that, and files of other sizes than the manifest
    says are refused. The contents of the files are not checked.

    Args:
        path: The folder.

    Raises:
        FileNotFoundError: There is no folder, or it is not a complete file of rows.
        ValueError: It was written by another version, or its files have other sizes.

    Example:
        >>> import keras_bandmf as bandmf
        >>> import numpy as np
        >>> import os, tempfile
        >>> folder = tempfile.TemporaryDirectory()
        >>> path = os.path.join(folder.name, "rows")
        >>> rows = bandmf.sources.convert([(np.ones(3), i) for i in range(10)], path)
        >>> len(rows), rows[4]
        (10, (array([1., 1., 1.]), array(4)))
    """

    def __init__(self, path: str | os.PathLike):
        self._path = pathlib.Path(path)
        self._open()

    def _open(self) -> None:
        manifest = _read_manifest(self._path)
        self._num_rows = int(manifest["num_rows"])
        for name, size in manifest["files"].items():
            found = (self._path / name).stat().st_size if (self._path / name).exists() else None
            if found != size:
                raise ValueError(
                    f"Expected {name} of {self._path} to have {size} bytes. Received: {found}. The "
                    "files were changed or cut off: convert the data again."
                )
        self._columns = {
            name: _structure(column, self._leaf) for name, column in manifest["columns"].items()
        }

    def _leaf(self, description: dict[str, Any]) -> Any:
        file, dtype = self._path / description["file"], tf.as_dtype(description["dtype"])
        if dtype == tf.string:
            ends = np.load(_ends_of(file), mmap_mode="r")
            return _Strings(_mapped_file(file, np.dtype(np.uint8), None), ends)
        numpy_dtype = np.dtype(dtype.as_numpy_dtype)
        return _mapped_file(file, numpy_dtype, (self._num_rows, *description["shape"]))

    @property
    def columns(self) -> dict[str, Any] | None:
        """The columns as memory-mapped arrays; None if some of them are byte strings."""
        found: list[Any] = []
        for name, column in self._columns.items():
            map_leaves(lambda leaf, _: found.append(leaf), column, name)
        return None if any(isinstance(leaf, _Strings) for leaf in found) else dict(self._columns)

    def __len__(self) -> int:
        return self._num_rows

    def __getitem__(self, number: int) -> Any:
        number = range(self._num_rows)[number]
        columns = tuple(
            map_leaves(lambda leaf, _: _row(leaf, number), column, name)
            for name, column in self._columns.items()
        )
        return columns[0] if len(columns) == 1 else columns

    def __getitems__(self, numbers: list[int]) -> list[Any]:
        return [self[number] for number in numbers]

    def __reduce__(self) -> tuple[type[StoredRows], tuple[str]]:
        return StoredRows, (os.fspath(self._path),)

    def __repr__(self) -> str:
        return f"<StoredRows of {self._num_rows} rows in {os.fspath(self._path)!r}>"


class _Strings:
    """Byte strings one after the other, and where each ends."""

    def __init__(self, joined: np.ndarray, ends: np.ndarray):
        self._joined, self._ends = joined, ends

    def __getitem__(self, number: int) -> bytes:
        start = int(self._ends[number - 1]) if number else 0
        return self._joined[start : int(self._ends[number])].tobytes()


def _row(leaf: Any, number: int) -> Any:
    return leaf[number] if isinstance(leaf, _Strings) else np.array(leaf[number])


def write_rows(
    stream: tf.data.Dataset | Iterable[Any],
    path: str | os.PathLike,
    callback: Callable[[ConversionProgress], object] | None = None,
) -> StoredRows:
    """Writes a stream to a folder; see `sources.convert`."""
    path = pathlib.Path(path)
    if path.exists():
        raise FileExistsError(
            f"Expected `path` to be new. Received: path={os.fspath(path)!r}, which exists. Load it "
            "with `keras_bandmf.sources.load`, or remove it."
        )
    rows, total = _rows_of(stream)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = pathlib.Path(tempfile.mkdtemp(prefix=f"{path.name}.partial-", dir=path.parent))
    try:
        count = _write(rows, total, partial, callback)
        if not count:
            raise ValueError("Expected `stream` to yield rows. Received: a stream without any.")
        os.rename(partial, path)
        _sync(path.parent)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    if callback is not None:
        callback(ConversionProgress(count, count, True))
    return StoredRows(path)


def _rows_of(stream: Any) -> tuple[Iterator[Any], int | None]:
    """Returns an iterator over the elements of a stream, and their number if it is known."""
    if isinstance(stream, tf.data.Dataset):
        cardinality = int(stream.cardinality())
        if cardinality == tf.data.INFINITE_CARDINALITY:
            raise ValueError(
                "Expected `stream` to be finite. Received: infinite cardinality. Use no "
                "`.repeat()`, or `.take(n)`."
            )
        options = tf.data.Options()
        options.deterministic = True
        elements = stream.with_options(options).as_numpy_iterator()
        return elements, cardinality if cardinality >= 0 else None
    if not isinstance(stream, Iterable) or isinstance(stream, (str, bytes, dict)):
        raise TypeError(
            "Expected `stream` to be a tf.data.Dataset or another iterable of single rows. "
            f"Received: stream of type {type(stream).__name__}."
        )
    return iter(stream), len(stream) if isinstance(stream, Sized) else None


def _write(
    rows: Iterator[Any],
    total: int | None,
    folder: pathlib.Path,
    callback: Callable[[ConversionProgress], object] | None,
) -> int:
    """Writes all rows and, after everything else, the manifest. Returns the number of rows."""
    columns: dict[str, Any] = {}
    writers: list[_Writer] = []
    count = 0

    def writer_of(value: Any, name: str) -> _Writer:
        writers.append(_Writer(folder, f"column_{len(writers)}.npy", value, name))
        return writers[-1]

    try:
        for count, element in enumerate(rows, start=1):
            row = unpacked(element, f"row {count - 1} of the stream")
            if "x" not in row:
                raise TypeError(
                    "Expected rows to be x, (x, y) or (x, y, sample_weight). Received: x=None in "
                    f"row {count - 1} of the stream."
                )
            if not columns:
                columns = {name: mapped(writer_of, part, name) for name, part in row.items()}
                _check_space(folder, writers, total)
            _add(columns, row, count - 1)
            if callback is not None and count % _CHUNK_ROWS == 0:
                callback(ConversionProgress(count, total, False))
        for writer in writers:
            writer.close(count)
    except BaseException:
        for writer in writers:
            writer.abandon()
        raise
    files = {name: size for writer in writers for name, size in writer.sizes().items()}
    manifest = {
        "format": _FORMAT,
        "version": _VERSION,
        "num_rows": count,
        "files": files,
        "columns": {name: _described(column) for name, column in columns.items()},
    }
    with open(folder / _MANIFEST, "w", encoding="utf-8") as file:
        json.dump(manifest, file, indent=1)
        file.flush()
        os.fsync(file.fileno())
    return count


def _add(columns: Any, row: Any, number: int) -> None:
    """Writes a row, whose structure must be that of the columns."""
    if isinstance(columns, _Writer):
        columns.add(row, number)
    elif isinstance(columns, dict):
        if not isinstance(row, dict) or row.keys() != columns.keys():
            raise _other_structure(number)
        for key, column in columns.items():
            _add(column, row[key], number)
    else:
        if not isinstance(row, tuple) or len(row) != len(columns):
            raise _other_structure(number)
        for column, part in zip(columns, row, strict=True):
            _add(column, part, number)


def _other_structure(number: int) -> ValueError:
    return ValueError(
        "Expected all rows of the stream to have one structure. Received: another one in row "
        f"{number} than in row 0."
    )


def _array(value: Any, name: str) -> np.ndarray:
    """Returns a value as it is to be stored: float64 stays, strings become objects of bytes."""
    if isinstance(value, (list, int, float, complex, str, bytes)):
        value = plain_array(value)
    if isinstance(value, np.ndarray) and value.dtype == np.float64:
        return np.ascontiguousarray(value) if value.ndim else value
    return as_array(value, name)


class _Writer:
    """The file of one leaf."""

    def __init__(self, folder: pathlib.Path, file: str, value: Any, name: str):
        array = _array(value, f"{name} of row 0")
        self.name, self.file = name, file
        self.shape, self.dtype = array.shape, array.dtype
        self.strings = array.dtype == object
        if self.strings and array.ndim:
            raise ValueError(
                f"Expected `{name}` to hold one string a row, or numbers. Received: strings of "
                f"shape {array.shape}. Join them, or turn them into numbers."
            )
        self._folder = folder
        self._out = open(folder / file, "wb")  # noqa: SIM115
        self._out.write(bytes(_HEADER_BYTES))
        self._ends: list[int] = []
        self._length = 0

    def add(self, value: Any, number: int) -> None:
        array = value
        if type(value) is not np.ndarray or value.dtype != self.dtype:
            array = _array(value, f"{self.name} of row {number}")
        if array.shape != self.shape or array.dtype != self.dtype:
            raise ValueError(
                "Expected all rows of the stream to have one shape and dtype, and to be single "
                f"rows (`dataset.unbatch()`). Received: {self.name} of shape {array.shape} and "
                f"{array.dtype} in row {number}, and of {self.shape} and {self.dtype} in row 0. "
                "Pad to a fixed length."
            )
        if self.strings:
            self._length += self._out.write(array[()])
            self._ends.append(self._length)
        else:
            self._out.write(np.ascontiguousarray(array).tobytes())

    def close(self, rows: int) -> None:
        """Writes what is buffered, then the headers."""
        if self.strings:
            shape: tuple[int, ...] = (self._length,)
            dtype = np.dtype(np.uint8)
            ends = _ends_of(self._folder / self.file)
            with open(ends, "wb") as file:
                np.save(file, np.array(self._ends, np.int64))
                file.flush()
                os.fsync(file.fileno())
        else:
            shape, dtype = (rows, *self.shape), self.dtype
        with self._out:
            self._out.flush()
            self._out.seek(0)
            self._out.write(_header(shape, dtype))
            self._out.flush()
            os.fsync(self._out.fileno())

    def abandon(self) -> None:
        """Closes the file, whatever is in it."""
        with contextlib.suppress(OSError):
            self._out.close()

    def sizes(self) -> dict[str, int]:
        files = [self._folder / self.file]
        if self.strings:
            files.append(_ends_of(files[0]))
        return {file.name: file.stat().st_size for file in files}

    def row_bytes(self) -> int:
        return 0 if self.strings else self.dtype.itemsize * int(np.prod(self.shape))


def _check_space(folder: pathlib.Path, writers: list[_Writer], total: int | None) -> None:
    """Refuses at once what cannot fit on the disk."""
    needed = (total or 0) * sum(writer.row_bytes() for writer in writers)
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise OSError(
            f"Expected room for {total} rows of {needed} bytes in {folder.parent}. Received: "
            f"{free} bytes. Make room, or choose another `path`."
        )


def _header(shape: tuple[int, ...], dtype: np.dtype) -> bytes:
    """Returns the header of an .npy file (format 1.0), with room for any number of rows."""
    # An extended type, such as bfloat16, is bytes to NumPy; the manifest has its name.
    descr = dtype.str if dtype.kind != "V" else f"|V{dtype.itemsize}"
    text = repr({"descr": descr, "fortran_order": False, "shape": shape}).encode("latin1")
    begin = b"\x93NUMPY\x01\x00" + (_HEADER_BYTES - 10).to_bytes(2, "little")
    if len(text) > _HEADER_BYTES - 11:
        raise ValueError(f"Expected rows of fewer axes. Received: rows of shape {shape[1:]}.")
    return begin + text.ljust(_HEADER_BYTES - 11) + b"\n"


def _mapped_file(file: pathlib.Path, dtype: np.dtype, shape: tuple[int, ...] | None) -> np.ndarray:
    """Returns a file without its header, memory-mapped."""
    if file.stat().st_size == _HEADER_BYTES:  # nothing can be mapped
        return np.empty(shape or (0,), dtype)
    return np.memmap(file, dtype, "r", offset=_HEADER_BYTES, shape=shape)


def _ends_of(file: pathlib.Path) -> pathlib.Path:
    return file.with_suffix(".ends.npy")


def _described(column: Any) -> dict[str, Any]:
    """Returns the structure of a column as JSON."""
    if isinstance(column, _Writer):
        dtype = "string" if column.strings else tf.as_dtype(column.dtype).name
        return {"file": column.file, "dtype": dtype, "shape": list(column.shape)}
    if isinstance(column, dict):
        if not all(isinstance(key, str) for key in column):
            raise TypeError(f"Expected the keys of dicts to be strings. Received: {list(column)}.")
        return {"dict": {key: _described(part) for key, part in column.items()}}
    return {"tuple": [_described(part) for part in column]}


def _structure(description: dict[str, Any], leaf: Callable[[dict[str, Any]], Any]) -> Any:
    if "dict" in description:
        return {key: _structure(part, leaf) for key, part in description["dict"].items()}
    if "tuple" in description:
        return tuple(_structure(part, leaf) for part in description["tuple"])
    return leaf(description)


def _read_manifest(path: pathlib.Path) -> dict[str, Any]:
    try:
        manifest = json.loads((path / _MANIFEST).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise FileNotFoundError(
            "Expected `path` to be a folder that `keras_bandmf.sources.convert` wrote to its end. "
            f"Received: path={os.fspath(path)!r}, without a readable {_MANIFEST}. Convert the "
            "data again."
        ) from error
    if manifest.get("format") != _FORMAT or manifest.get("version") != _VERSION:
        raise ValueError(
            f"Expected rows in version {_VERSION} of the format. Received: "
            f"{manifest.get('format')!r} in version {manifest.get('version')!r}. Convert the data "
            "again with this release."
        )
    return manifest


def _sync(folder: pathlib.Path) -> None:
    """Lets the name of a new folder survive a crash, where the system can."""
    if hasattr(os, "O_DIRECTORY"):
        descriptor = os.open(folder, os.O_DIRECTORY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
