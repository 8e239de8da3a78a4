"""Files of rows: a stream is written once, and its rows are then found by their numbers.

Poisson sampling and random allocation need any row at any time, which TFRecord files and other
streams do not give. `convert` writes them to a folder of memory-mapped files, and `load` opens it:

```python
records = tf.data.TFRecordDataset(files).map(parse)       # single rows: (x, y)
rows = bandmf.sources.convert(records, "rows", callback=bandmf.ProgressBar())
model.fit(plan.batches(rows))                             # next time: bandmf.sources.load("rows")
```

docs/data.md has all kinds of data that `plan.batches` takes.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from typing import Any

import tensorflow as tf

from keras_bandmf.sampling.stores.files import ConversionProgress, StoredRows, write_rows

__all__ = ["ConversionProgress", "StoredRows", "convert", "load"]


def convert(
    stream: tf.data.Dataset | Iterable[Any],
    path: str | os.PathLike,
    *,
    callback: Callable[[ConversionProgress], object] | None = None,
) -> StoredRows:
    """Writes a finite stream of single rows to a folder, from which any row can be read quickly.

    Numbers are stored as they are. A string of bytes may have any length, such as a record of a
    TFRecord file or a JPEG; `plan.batches(rows, decode=...)` turns it into arrays.

    Formal guarantees: rows have the order in which the stream yields them, which becomes their
    number in every run. The folder `path` appears only when it is complete, and its files are on
    disk. If writing fails, what was written is removed; if the process is killed, it remains as a
    folder `path.partial-...`, which `load` refuses and which may be removed. The folder is readable
    by its owner only, where the system has such modes.

    Convert before a run begins: `fit` hashes arrays in memory in another way than rows on disk, so
    a run that began with the one does not go on with the other.

    Args:
        stream: A `tf.data.Dataset`, or another iterable, of `x`, `(x, y)` or
            `(x, y, sample_weight)`: single rows of one shape. Not batched, repeated or shuffled.
            `y` may be None. Numbers are stored in the byte order of this machine.
        path: The new folder.
        callback: Called with a `ConversionProgress` every 256 rows and at the end, for example a
            `keras_bandmf.ProgressBar()`.

    Returns:
        The rows, as `load` returns them.

    Raises:
        TypeError: `stream` is not iterable, or a row holds something else than dense numbers
            without a mask or strings of bytes, or dicts with keys that are not strings.
        ValueError: The stream is endless or empty, rows differ in structure, shape or dtype, or
            have too many axes.
        FileExistsError: There is a file or folder `path`.
        OSError: The disk is full, or cannot be written.

    Example:
        >>> import os, tempfile
        >>> import keras_bandmf as bandmf
        >>> import numpy as np
        >>> import tensorflow as tf
        >>> stream = tf.data.Dataset.from_tensor_slices((np.eye(100), np.arange(100)))
        >>> folder = tempfile.TemporaryDirectory()
        >>> rows = bandmf.sources.convert(stream, os.path.join(folder.name, "rows"))
        >>> plan = bandmf.TrainingPlan(
        ...     num_examples=100, batch_size=10, epochs=1, noise_multiplier=1.0, delta=1e-5,
        ...     num_bands=1)
        >>> plan.batches(rows).rows(np.array([7]))["y"]
        array([7])
    """
    return write_rows(stream, path, callback)


def load(path: str | os.PathLike) -> StoredRows:
    """Opens a folder that `convert` wrote.

    Formal guarantees: it opens no file outside the folder, and none whose size, dtype, byte order
    or shape is not what the manifest says. The values are not checked.

    Args:
        path: The folder.

    Returns:
        The rows, to be passed to `plan.batches` as `x`.

    Raises:
        FileNotFoundError: There is no such folder, or it was not written to its end.
        ValueError: It was written in another version of the format, or its files are not what
            its manifest says.

    Example:
        >>> import os, tempfile
        >>> import keras_bandmf as bandmf
        >>> folder = tempfile.TemporaryDirectory()
        >>> path = os.path.join(folder.name, "records")
        >>> _ = bandmf.sources.convert([b"one", b"three"], path)
        >>> rows = bandmf.sources.load(path)
        >>> len(rows), rows[1]
        (2, b'three')
    """
    return StoredRows(path)


def __dir__() -> list[str]:
    return __all__
