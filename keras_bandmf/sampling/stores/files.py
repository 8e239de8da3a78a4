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
import math
import os
import pathlib
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sized
from typing import Any, NamedTuple

import numpy as np
import tensorflow as tf

from keras_bandmf.sampling.sources import as_array, map_leaves, unpacked
from keras_bandmf.sampling.stores.rows import plain_array

_MANIFEST = "manifest.json"
_FORMAT = "keras_bandmf rows"
_VERSION = 1
_HEADER_BYTES = 256
_CHUNK_ROWS = 256
_COLUMNS = ("x", "y", "sample_weight")


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

    Row i has the form that the stream gave it: `x`, `(x, y)`, `(x, None, sample_weight)` or
    `(x, y, sample_weight)`, and `(x,)` where x is a tuple, of which Keras would make x and y.

    Formal guarantees: it is made only from a folder that was written to its end: the manifest is
    written last, and the folder gets its name after that. Files whose size, or whose header (dtype,
    byte order and shape), is not what the manifest says are refused, and so are names that lead out
    of the folder. The values in the files are not checked.

    Args:
        path: The folder. A relative one is made absolute, so that other processes find it.

    Raises:
        FileNotFoundError: There is no folder, or it is not a complete file of rows.
        ValueError: It was written by another version, or its files are not as its manifest says.

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
        if not isinstance(path, (str, os.PathLike)):
            raise TypeError(f"Expected `path` to be the path of a folder. Received: path={path!r}.")
        self._path = pathlib.Path(path).absolute()
        manifest = _read_manifest(self._path)
        self._num_rows: int = manifest["num_rows"]
        self._files: dict[str, int] = manifest["files"]
        for name, size in self._files.items():
            file = self._path / name
            found = file.stat().st_size if file.is_file() else None
            if found != size:
                raise ValueError(
                    f"Expected {name} of {self._path} to have {size} bytes. Received: {found}. The "
                    "files were changed or cut off: convert the data again."
                )
        self._columns = {
            name: _structure(manifest["columns"][name], self._leaf, self._path)
            for name in _COLUMNS
            if name in manifest["columns"]
        }

    def _leaf(self, description: dict[str, Any]) -> Any:
        name, shape = description.get("file"), description.get("shape")
        if name not in self._files:
            raise _broken(self._path, f"the file {name!r}, which it does not list")
        if not isinstance(shape, list) or not all(map(_is_size, shape)):
            raise _broken(self._path, f"{name} with shape {shape!r}")
        file, dtype = self._path / name, _dtype_of(description.get("dtype"), self._path)
        if dtype.hasobject:
            length = self._files[name] - _HEADER_BYTES
            joined = _mapped_file(file, np.dtype(np.uint8), (length,))
            if _ends_of(file).name not in self._files or shape:
                raise _broken(self._path, f"{name} without the ends of its strings")
            return _Strings(joined, _ends(_ends_of(file), self._num_rows, length))
        return _mapped_file(file, dtype, (self._num_rows, *shape))

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
        columns = {
            name: map_leaves(lambda leaf, _: _row(leaf, number), column, name)
            for name, column in self._columns.items()
        }
        x = columns["x"]
        if "sample_weight" in columns:
            return x, columns.get("y"), columns["sample_weight"]
        if "y" in columns:
            return x, columns["y"]
        return (x,) if isinstance(x, tuple) else x

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
        start, end = int(self._ends[number - 1]) if number else 0, int(self._ends[number])
        if not 0 <= start <= end <= len(self._joined):
            raise ValueError(
                f"Expected row {number} to end after it begins, in a file of {len(self._joined)} "
                f"bytes. Received: {start} to {end}. The file was changed: convert the data again."
            )
        return self._joined[start:end].tobytes()


def _row(leaf: Any, number: int) -> Any:
    return leaf[number] if isinstance(leaf, _Strings) else np.array(leaf[number])


def write_rows(
    stream: tf.data.Dataset | Iterable[Any],
    path: str | os.PathLike,
    callback: Callable[[ConversionProgress], object] | None = None,
) -> StoredRows:
    """Writes a stream to a folder; see `sources.convert`."""
    path = pathlib.Path(path).absolute()
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
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    with contextlib.suppress(OSError):  # network file systems cannot; the folder is complete
        _sync(path.parent)
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
    described: dict[str, Any] = {}
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
                columns = {
                    name: map_leaves(writer_of, part, name, lists_are_leaves=True)
                    for name, part in row.items()
                }
                described = {name: _described(part, name) for name, part in columns.items()}
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
        "columns": described,
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
    """Returns a value as it is to be stored: float64 stays, strings become objects of bytes.

    Numbers get the byte order of this machine, in which they are read.
    """
    if _has_mask(value):
        raise TypeError(
            f"Expected `{name}` to have all its values. Received: a masked array, whose hidden "
            "values would be stored. Fill in what is missing (`array.filled(value)`)."
        )
    if isinstance(value, (list, int, float, complex, str, bytes)):
        value = plain_array(value)
    if isinstance(value, np.ndarray):
        value = value.astype(value.dtype.newbyteorder("="), copy=False)
        if value.dtype == np.float64:
            return np.ascontiguousarray(value) if value.ndim else value
    return as_array(value, name)


def _has_mask(value: Any) -> bool:
    if isinstance(value, list):
        return any(map(_has_mask, value))
    return isinstance(value, np.ma.MaskedArray)


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
        if not self.strings:
            _check_axes(array, name)
        self._folder = folder
        self._out = open(folder / file, "wb")  # noqa: SIM115
        self._out.write(bytes(_HEADER_BYTES))
        self._ends: list[int] = []
        self._length = 0

    def add(self, value: Any, number: int) -> None:
        array = value
        if type(value) is not np.ndarray or value.dtype != self.dtype or self.strings:
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
        raise ValueError(f"a header of {len(text)} bytes, for {_HEADER_BYTES - 11}")
    return begin + text.ljust(_HEADER_BYTES - 11) + b"\n"


def _check_axes(array: np.ndarray, name: str) -> None:
    """Refuses rows of which no file can be made, before any is written."""
    try:
        array[None]  # NumPy must have room for one axis more
        _header((1 << 62, *array.shape), array.dtype)
    except (IndexError, ValueError) as error:
        raise ValueError(
            f"Expected `{name}` to have fewer axes. Received: rows of shape {array.shape}: {error}."
        ) from error


def _mapped_file(file: pathlib.Path, dtype: np.dtype, shape: tuple[int, ...]) -> np.ndarray:
    """Returns a file without its header, memory-mapped; it must be the one that was written."""
    size = _HEADER_BYTES + dtype.itemsize * math.prod(shape)
    with open(file, "rb") as opened:
        header = opened.read(_HEADER_BYTES)
    if file.stat().st_size != size or header != _header(shape, dtype):
        raise _broken(
            file.parent,
            f"{file.name} of shape {shape} and {dtype.name} in the byte order of this machine, "
            f"which is not what the file is: {file.stat().st_size} bytes that begin with "
            f"{header[10:90]!r}",
        )
    if size == _HEADER_BYTES:  # nothing can be mapped
        return np.empty(shape, dtype)
    return np.memmap(file, dtype, "r", offset=_HEADER_BYTES, shape=shape)


def _ends(file: pathlib.Path, rows: int, length: int) -> np.ndarray:
    """Returns the ends of all strings, memory-mapped."""
    try:
        ends = np.load(file, mmap_mode="r")
    except (EOFError, ValueError) as error:
        raise _broken(file.parent, f"{file.name}, which cannot be read: {error}") from error
    if not isinstance(ends, np.ndarray) or ends.shape != (rows,) or ends.dtype != np.int64:
        raise _broken(file.parent, f"{file.name} for {rows} rows, but it has something else")
    if ends[-1] != length:
        raise _broken(file.parent, f"{file.name}, which ends at {ends[-1]} and not at {length}")
    return ends


def _ends_of(file: pathlib.Path) -> pathlib.Path:
    return file.with_suffix(".ends.npy")


def _described(column: Any, name: str) -> dict[str, Any]:
    """Returns the structure of a column as JSON."""
    if isinstance(column, _Writer):
        dtype = "string" if column.strings else tf.as_dtype(column.dtype).name
        return {"file": column.file, "dtype": dtype, "shape": list(column.shape)}
    if not column:
        raise ValueError(f"Expected `{name}` to hold an array. Received: {name}={column!r}.")
    if isinstance(column, dict):
        if not all(isinstance(key, str) for key in column):
            raise TypeError(
                f"Expected the keys of dicts to be strings. Received: {list(column)} in `{name}`."
            )
        return {"dict": {key: _described(part, name) for key, part in column.items()}}
    return {"tuple": [_described(part, name) for part in column]}


def _structure(description: Any, leaf: Callable[[dict[str, Any]], Any], path: pathlib.Path) -> Any:
    """Returns the structure that `_described` wrote, with `leaf` of what was said of each file."""
    if isinstance(description, dict):
        parts = description.get("dict")
        if isinstance(parts, dict) and parts:
            return {key: _structure(part, leaf, path) for key, part in parts.items()}
        parts = description.get("tuple")
        if isinstance(parts, list) and parts:
            return tuple(_structure(part, leaf, path) for part in parts)
        if isinstance(description.get("file"), str):
            return leaf(description)
    raise _broken(path, f"a column {description!r}")


def _dtype_of(name: Any, path: pathlib.Path) -> np.dtype:
    """Returns the NumPy dtype of a column: that of objects for strings."""
    try:
        dtype = tf.as_dtype(name) if isinstance(name, str) else None
        numpy_dtype = None if dtype is None else np.dtype(dtype.as_numpy_dtype)
    except (KeyError, TypeError):  # unknown to TensorFlow, or to NumPy
        numpy_dtype = None
    if numpy_dtype is None or (numpy_dtype.hasobject and dtype != tf.string):
        raise _broken(path, f"the dtype {name!r}")
    return numpy_dtype


def _is_size(value: Any) -> bool:
    return type(value) is int and value >= 0


def _read_manifest(path: pathlib.Path) -> dict[str, Any]:
    """Returns the manifest of a folder: its rows, the sizes of its files, and its columns."""
    try:
        text = (path / _MANIFEST).read_bytes()
    except (FileNotFoundError, NotADirectoryError) as error:
        raise FileNotFoundError(
            "Expected `path` to be a folder that `keras_bandmf.sources.convert` wrote to its end. "
            f"Received: path={os.fspath(path)!r}, without a {_MANIFEST}. Convert the data again."
        ) from error
    try:
        manifest = json.loads(text.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise _broken(path, f"no JSON: {error}") from error
    if not isinstance(manifest, dict):
        raise _broken(path, f"a {type(manifest).__name__} in place of a dict")
    if manifest.get("format") != _FORMAT or manifest.get("version") != _VERSION:
        raise ValueError(
            f"Expected rows in version {_VERSION} of the format. Received: "
            f"{manifest.get('format')!r} in version {manifest.get('version')!r}. Convert the data "
            "again with this release."
        )
    rows, files, columns = (manifest.get(key) for key in ("num_rows", "files", "columns"))
    if not _is_size(rows) or not rows:
        raise _broken(path, f"num_rows={rows!r}")
    if not isinstance(files, dict) or not all(map(_is_size, files.values())):
        raise _broken(path, f"files={files!r}")
    for name in files:
        if name != pathlib.Path(name).name or name == ".." or "\0" in name:
            raise _broken(path, f"{name!r}, which is no file of the folder")
    if not isinstance(columns, dict) or "x" not in columns or not columns.keys() <= {*_COLUMNS}:
        raise _broken(path, f"columns={columns!r}")
    return manifest


def _broken(path: pathlib.Path, what: str) -> ValueError:
    return ValueError(
        f"Expected {path / _MANIFEST} to be as `keras_bandmf.sources.convert` wrote it, and to "
        f"describe the files beside it. Received: {what}. The folder was changed: convert the "
        "data again."
    )


def _sync(folder: pathlib.Path) -> None:
    """Lets the name of a new folder survive a crash, where the system can."""
    if hasattr(os, "O_DIRECTORY"):
        descriptor = os.open(folder, os.O_DIRECTORY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
