"""Files of rows: exact, found again, and never half written."""

import errno
import json
import os
import pickle
import signal
import subprocess
import sys

import numpy as np
import pytest
import tensorflow as tf

import keras_bandmf as bandmf
from keras_bandmf.sampling.stores import MemoryStore, columns, files, open_store
from keras_bandmf.sampling.stores.random_access import RandomAccessStore
from tests.sampling.stores.test_rows import assert_same

N = 50


def arrays():
    rng = np.random.default_rng(1)
    x = {"a": rng.normal(size=(N, 3)).astype("float32"), "b": (rng.random(N) > 0.5,)}
    return x, rng.integers(0, 9, N), rng.random(N)


def test_a_stream_becomes_rows_that_plans_take(tmp_path, monkeypatch):
    x, y, weight = arrays()
    stream = tf.data.Dataset.from_tensor_slices((x, y, weight))
    reports = []
    rows = bandmf.sources.convert(stream, tmp_path / "new" / "rows", callback=reports.append)
    assert len(rows) == N and reports == [(N, N, True)]
    first = rows[7]
    np.testing.assert_array_equal(first[0]["a"], x["a"][7])
    assert first[0]["b"][0] == x["b"][0][7] and first[2] == weight[7]
    with pytest.raises(IndexError):
        rows[N]
    memory = MemoryStore.read(x, y, weight, N)
    indices = np.array([49, 3, 3, 0])
    for smallest in (1 << 28, 0):
        monkeypatch.setattr(columns, "MAPPED_BYTES", smallest)
        for loaded in (rows, bandmf.sources.load(tmp_path / "new" / "rows")):
            store = open_store(loaded, None, None, N)
            assert isinstance(store, MemoryStore if smallest else RandomAccessStore)
            assert_same(store.rows(indices), memory.rows(indices))
            assert store.spec() == memory.spec()
    again = pickle.loads(pickle.dumps(rows))
    np.testing.assert_array_equal(again[3][0]["a"], x["a"][3])
    assert "50 rows" in repr(again)
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["rows"]


def test_the_files_are_those_of_numpy(tmp_path):
    x = np.arange(12.0).reshape(4, 3)
    bandmf.sources.convert(list(x), tmp_path / "rows")
    np.testing.assert_array_equal(np.load(tmp_path / "rows" / "column_0.npy"), x)


def test_bfloat16_keeps_its_type(tmp_path):
    x = tf.cast(tf.random.stateless_normal((5, 2), (1, 2)), tf.bfloat16)
    rows = bandmf.sources.convert(tf.data.Dataset.from_tensor_slices(x), tmp_path / "rows")
    assert rows[0].dtype == tf.bfloat16.as_numpy_dtype
    np.testing.assert_array_equal(rows[4], x[4])


def test_records_of_a_tfrecord_file_are_decoded_when_they_are_drawn(tmp_path):
    path = os.fspath(tmp_path / "data.tfrecord")
    records = [tf.io.serialize_tensor(tf.range(i % 3, i % 3 + 2)).numpy() for i in range(N)]
    with tf.io.TFRecordWriter(path) as writer:
        for record in records:
            writer.write(record)
    rows = bandmf.sources.convert(tf.data.TFRecordDataset(path), tmp_path / "rows")
    assert [rows[i] for i in range(N)] == records

    def decode(record):
        return tf.io.parse_tensor(record, tf.int32).numpy()

    plan = bandmf.TrainingPlan(
        num_examples=N, batch_size=5, epochs=1, num_bands=1, noise_multiplier=1.0, delta=1e-5
    )
    batches = plan.batches(rows, decode=decode, seed=0)
    assert batches.rows(np.array([4, 2]))["x"].tolist() == [[1, 2], [2, 3]]
    with pytest.raises(TypeError, match="strings"):
        plan.batches(rows)


def test_empty_strings_and_only_those(tmp_path):
    rows = bandmf.sources.convert([b"", b""], tmp_path / "rows")
    assert [rows[0], rows[1]] == [b"", b""]


@pytest.mark.parametrize(
    ("stream", "error", "match"),
    [
        (lambda: tf.data.Dataset.range(3).repeat(), ValueError, "infinite"),
        (lambda: [], ValueError, "stream without any"),
        (lambda: 3, TypeError, "iterable"),
        (lambda: {"x": np.ones(3)}, TypeError, "iterable"),
        (lambda: tf.data.Dataset.range(10).batch(4), ValueError, r"unbatch.*\(2,\).*in row 2"),
        (lambda: [np.ones(2), np.ones(3)], ValueError, r"\(3,\).*in row 1"),
        (lambda: [np.ones(2), np.ones(2, int)], ValueError, "int64 in row 1"),
        (lambda: [(1, 2), 3], ValueError, "one structure.*row 1|row 1"),
        (lambda: [{"a": 1}, {"b": 1}], ValueError, "one structure.*row 1"),
        (lambda: [None], TypeError, "row 0|NoneType"),
        (lambda: [np.array(["a", "b"])], ValueError, "one string a row"),
        (lambda: [(1, 2, 3, 4)], ValueError, "tuple of 4"),
        (lambda: [{3: 1}], TypeError, "keys of dicts"),
    ],
)
def test_streams_that_are_no_rows(stream, error, match, tmp_path):
    with pytest.raises(error, match=match):
        bandmf.sources.convert(stream(), tmp_path / "rows")
    assert not list(tmp_path.iterdir())


def test_an_existing_path_is_kept(tmp_path):
    (tmp_path / "rows").write_text("mine")
    with pytest.raises(FileExistsError, match="exists"):
        bandmf.sources.convert([1], tmp_path / "rows")
    assert (tmp_path / "rows").read_text() == "mine"


class FullDisk:
    """A file that takes a number of bytes."""

    def __init__(self, file, room):
        self._file, self._room = file, room

    def write(self, data):
        self._room -= len(data)
        if self._room < 0:
            raise OSError(errno.ENOSPC, "No space left on device")
        return self._file.write(data)

    def __getattr__(self, name):
        return getattr(self._file, name)

    def __enter__(self):
        return self

    def __exit__(self, *args):
        self._file.close()


@pytest.mark.parametrize("room", [100, 300, 256 + 50 * 8 + 10])
def test_a_full_disk_leaves_nothing(room, tmp_path, monkeypatch):
    real = open
    monkeypatch.setattr(
        files,
        "open",
        lambda path, mode, **options: FullDisk(real(path, mode, **options), room),
        raising=False,
    )
    with pytest.raises(OSError, match="No space"):
        bandmf.sources.convert(list(np.arange(50.0)), tmp_path / "rows")
    assert not list(tmp_path.iterdir())


def test_what_cannot_fit_is_refused_at_once(tmp_path):
    endless = tf.data.Dataset.range(10**17).map(lambda i: tf.zeros([100]))
    with pytest.raises(OSError, match="room for"):
        bandmf.sources.convert(endless, tmp_path / "rows")


def test_an_error_in_the_stream_leaves_nothing(tmp_path):
    def stream():
        yield np.ones(3)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        bandmf.sources.convert(stream(), tmp_path / "rows")
    assert not list(tmp_path.iterdir())


def test_a_killed_conversion_is_not_taken_for_whole(tmp_path):
    program = (
        "import os, sys, numpy as np, keras_bandmf as bandmf\n"
        "def stream():\n"
        "    for i in range(1000):\n"
        "        yield np.ones(100)\n"
        f"    os.kill(os.getpid(), {signal.SIGKILL:d})\n"
        "bandmf.sources.convert(stream(), sys.argv[1])\n"
    )
    path = tmp_path / "rows"
    assert subprocess.run([sys.executable, "-c", program, os.fspath(path)]).returncode == -9
    assert not path.exists()
    (partial,) = tmp_path.iterdir()
    for left in (path, partial):
        with pytest.raises(FileNotFoundError, match="wrote to its end"):
            bandmf.sources.load(left)


def test_files_that_were_cut_off_or_are_of_another_version(tmp_path):
    path = tmp_path / "rows"
    bandmf.sources.convert(list(np.arange(50.0)), path)
    column = path / "column_0.npy"
    content = column.read_bytes()
    column.write_bytes(content[:-8])
    with pytest.raises(ValueError, match="cut off"):
        bandmf.sources.load(path)
    column.write_bytes(content)
    bandmf.sources.load(path)
    manifest = json.loads((path / "manifest.json").read_text())
    (path / "manifest.json").write_text(json.dumps(manifest | {"version": 99}))
    with pytest.raises(ValueError, match="version 99"):
        bandmf.sources.load(path)
    column.unlink()
    (path / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(ValueError, match="None"):
        bandmf.sources.load(path)


def test_the_progress_bar_counts_rows(tmp_path, capsys):
    bandmf.sources.convert(
        tf.data.Dataset.range(600), tmp_path / "rows", callback=bandmf.ProgressBar()
    )
    assert "600/600" in capsys.readouterr().out
