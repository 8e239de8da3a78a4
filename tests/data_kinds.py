"""The counting data of `tests/runs.py` in every kind of storage, with the real libraries."""

import pathlib

import numpy as np
import pytest

import keras_bandmf as bandmf
from keras_bandmf.sampling.stores import columns
from tests import runs


def _arrays():
    return runs.counting_data()


def mapped(folder):
    """Memory-mapped float64, which is cast when it is read."""
    columns.MAPPED_BYTES = 0  # in a process of a test only
    x, y = _arrays()
    if not (folder / "x.npy").exists():
        np.save(folder / "x.npy", x.astype(np.float64))
    return (np.load(folder / "x.npy", mmap_mode="r"), y), {}


def hdf5(folder):
    """Both columns in one file."""
    h5py = pytest.importorskip("h5py")
    x, y = _arrays()
    if not (folder / "data.h5").exists():
        with h5py.File(folder / "data.h5", "w") as file:
            file.create_dataset("x", data=x, chunks=(10, x.shape[1]))
            file.create_dataset("y", data=y)
    file = h5py.File(folder / "data.h5", "r")
    return (file["x"], file["y"]), {}


def zarr(folder):
    """An array in chunks of ten rows."""
    library = pytest.importorskip("zarr")
    x, y = _arrays()
    if not (folder / "x.zarr").exists():
        stored = library.create_array(
            folder / "x.zarr", shape=x.shape, chunks=(10, x.shape[1]), dtype=x.dtype
        )
        stored[...] = x
    return (library.open_array(folder / "x.zarr", mode="r"), y), {}


def hugging_face(folder):
    """Rows that are dicts, in an Arrow file."""
    datasets = pytest.importorskip("datasets")
    x, y = _arrays()
    if not (folder / "arrow").exists():
        table = datasets.Dataset.from_dict({"x": x.tolist(), "y": y.tolist()})
        table.save_to_disk(folder / "arrow")
    source = datasets.load_from_disk(folder / "arrow")

    def decode(row):
        return np.array(row["x"], np.float32), np.float32(row["y"])

    return (source,), {"decode": decode, "workers": 2}


def _write_records(path):
    module = pytest.importorskip("array_record.python.array_record_module")
    if not path.exists():
        writer = module.ArrayRecordWriter(str(path), "group_size:1")
        for row in _arrays()[0]:
            writer.write(row.tobytes())
        writer.close()


def _decode_record(record):
    return np.frombuffer(record, np.float32), np.float32(0)


def array_record(folder):
    """Bytes, decoded to rows."""
    _write_records(folder / "x.array_record")
    library = pytest.importorskip("array_record.python.array_record_data_source")
    source = library.ArrayRecordDataSource(str(folder / "x.array_record"))
    return (source,), {"decode": _decode_record}


def grain(folder):
    """A Grain data set whose transformation decodes."""
    library = pytest.importorskip("grain")
    _write_records(folder / "x.array_record")
    source = library.sources.ArrayRecordDataSource(str(folder / "x.array_record"))
    return (library.MapDataset.source(source).map(_decode_record),), {}


def converted(folder):
    """A stream of TensorFlow, written to files."""
    import tensorflow as tf

    columns.MAPPED_BYTES = 0
    path = pathlib.Path(folder) / "rows"
    if path.exists():
        return (bandmf.sources.load(path),), {}
    return (bandmf.sources.convert(tf.data.Dataset.from_tensor_slices(_arrays()), path),), {}


KINDS = {
    kind.__name__: kind
    for kind in (mapped, hdf5, zarr, hugging_face, array_record, grain, converted)
}
