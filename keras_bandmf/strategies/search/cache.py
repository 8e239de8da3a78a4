"""The files of long searches: results and checkpoints, named after the content of the request."""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
import pathlib
import tempfile
import warnings
from collections.abc import Mapping
from typing import IO, Any, Literal, NamedTuple

import numpy as np

Kind = Literal["result", "checkpoint"]

# Must change whenever the same request may give another result, or the format of files changes.
_VERSION = 1
_FORMAT = "keras_bandmf search"
# A banded strategy of some million numbers, as a config.
_MAX_HEADER = 1 << 26


class Record(NamedTuple):
    """What one file holds.

    Attributes:
      fields: anything that `json` can write.
      arrays: float64 arrays by name.
    """

    fields: dict[str, Any]
    arrays: dict[str, np.ndarray]


class Store:
    """The files of one request in a directory: `<SHA-256 of the request>.<kind>`.

    A file is written under a temporary name and then renamed, so that it is there either whole or
    not at all. It ends with the SHA-256 of everything before: a file that is cut short, damaged or
    edited causes a warning and is not used.

    Args:
      directory: where the files are. It is made if it does not exist.
      request: everything that the result depends on, as `json` can write it.

    Raises:
      TypeError: if `directory` is not a path.
      OSError: if the directory cannot be made.
    """

    def __init__(self, directory: str | os.PathLike[str], request: Mapping[str, Any]):
        if not isinstance(directory, (str, os.PathLike)):
            raise TypeError(
                "Expected `cache_dir` to be a path or None. Received: "
                f"cache_dir={directory!r}. Pass the directory for results and checkpoints."
            )
        self._directory = pathlib.Path(directory)
        self._directory.mkdir(parents=True, exist_ok=True)
        content = json.dumps({"version": _VERSION, **request}, sort_keys=True, allow_nan=False)
        self._name = hashlib.sha256(content.encode()).hexdigest()

    def path(self, kind: Kind) -> pathlib.Path:
        """Returns the path at which the record of this kind is or would be."""
        return self._directory / f"{self._name}.{kind}"

    def load(self, kind: Kind) -> Record | None:
        """Returns a record, or None if there is none that can be trusted.

        Args:
          kind: "result" or "checkpoint".

        Returns:
          The record, or None.

        Warns:
          RuntimeWarning: if the file is cut short, damaged or of another request.
        """
        path = self.path(kind)
        try:
            with path.open("rb") as file:
                return _read(file, self._heading(kind))
        except FileNotFoundError:
            return None
        except (OSError, ValueError, KeyError, TypeError, MemoryError) as error:
            warnings.warn(
                f"The file {path} is cut short, damaged or was edited ({error}). It is not used: "
                "the search repeats that work and writes the file again.",
                RuntimeWarning,
                stacklevel=2,
            )
            return None

    def save(self, kind: Kind, record: Record) -> None:
        """Writes a record in place of any earlier one of its kind.

        Args:
          kind: "result" or "checkpoint".
          record: what to write.

        Warns:
          RuntimeWarning: if it cannot be written, for instance because the disk is full. The
            earlier record is then still there.
        """
        path = self.path(kind)
        aside = None
        try:
            with tempfile.NamedTemporaryFile(dir=self._directory, delete=False) as file:
                aside = file.name
                _write(file, self._heading(kind), record)
                file.flush()
                os.fsync(file.fileno())
            os.replace(aside, path)
            aside = None
        except OSError as error:  # A file is not worth hours of search.
            warnings.warn(
                f"The file {path} cannot be written ({error}). The search goes on without it.",
                RuntimeWarning,
                stacklevel=2,
            )
        finally:
            if aside is not None:
                with contextlib.suppress(OSError):
                    os.unlink(aside)

    def remove(self, kind: Kind) -> None:
        """Removes the record of this kind, if there is one."""
        with contextlib.suppress(OSError):
            self.path(kind).unlink()

    def _heading(self, kind: Kind) -> dict[str, Any]:
        return {"format": _FORMAT, "version": _VERSION, "request": self._name, "kind": kind}


def digest(array: np.ndarray) -> str:
    """Returns the SHA-256 of the numbers of an array as little-endian float64."""
    return hashlib.sha256(_numbers(np.ascontiguousarray(array, "<f8"))).hexdigest()


def _numbers(array: np.ndarray) -> memoryview:
    """Returns the bytes of a contiguous array, without a copy."""
    return array.data.cast("B")


def _write(file: IO[bytes], heading: dict[str, Any], record: Record) -> None:
    """Writes one line of JSON, the numbers of the arrays, and the SHA-256 of both."""
    shapes = {name: array.shape for name, array in record.arrays.items()}
    line = json.dumps({**heading, "fields": record.fields, "shapes": shapes}).encode() + b"\n"
    hasher = hashlib.sha256(line)
    file.write(line)
    for array in record.arrays.values():
        numbers = _numbers(np.ascontiguousarray(array, "<f8"))
        hasher.update(numbers)
        file.write(numbers)
    file.write(hasher.digest())


def _read(file: io.BufferedReader, heading: dict[str, Any]) -> Record:
    """Reads what `_write` wrote; raises ValueError, KeyError or TypeError for anything else."""
    line = file.readline(_MAX_HEADER)
    header = json.loads(line)
    fields, shapes = header.pop("fields"), header.pop("shapes")
    if header != heading:
        raise ValueError("it is of another format or request")
    size = sum(8 * int(np.prod(shape, dtype=np.int64)) for shape in shapes.values())
    left = os.fstat(file.fileno()).st_size - len(line) - hashlib.sha256().digest_size
    if size != left:  # Checked before memory is allocated for it.
        raise ValueError(f"{size} bytes of numbers were expected, {left} found")
    hasher = hashlib.sha256(line)
    arrays = {}
    for name, shape in shapes.items():
        arrays[name] = np.empty(shape, "<f8")
        numbers = _numbers(arrays[name])
        if file.readinto(numbers) != len(numbers):
            raise ValueError("it ends early")
        hasher.update(numbers)
    if file.read() != hasher.digest():
        raise ValueError("its SHA-256 is wrong")
    return Record(fields, arrays)
