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
from keras_bandmf.sampling.sources import unpacked
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
        plan.batches(rows).first_rows()


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
        (lambda: [((), 1)], ValueError, r"`x` to hold an array"),
        (lambda: [np.ma.array([1.0, 2.0], mask=[0, 1])], TypeError, "x of row 0.*masked"),
        (lambda: [np.ma.array([1, 2], "f4", mask=[0, 1])], TypeError, "x of row 0.*masked"),
        (lambda: [[np.ma.array([1.0], mask=[1])]], TypeError, "x of row 0.*masked"),
        (lambda: [np.ones(1), np.ma.array([1.0], mask=[1])], TypeError, "x of row 1.*masked"),
        (lambda: [np.array(3j, object)], TypeError, "x of row 0.*complex"),
        (lambda: ["a", np.array(3j, object)], TypeError, "x of row 1.*complex"),
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


@pytest.mark.parametrize("dtype", ["f4", "f8", "u2", "i4", "i8", "c8"])
@pytest.mark.parametrize("orders", ["<<", ">>", "<>", "><"])
def test_numbers_of_any_byte_order_are_read_as_they_were(dtype, orders, tmp_path):
    values = np.arange(6).reshape(2, 3).astype(dtype)
    stream = [row.astype(order + dtype) for order, row in zip(orders, values, strict=True)]
    rows = bandmf.sources.convert(stream, tmp_path / "rows")
    for loaded in (rows, bandmf.sources.load(tmp_path / "rows")):
        np.testing.assert_array_equal(np.stack([loaded[0], loaded[1]]), values)
    stored = np.load(tmp_path / "rows" / "column_0.npy")
    assert stored.dtype.isnative and stored.dtype == values.dtype
    np.testing.assert_array_equal(stored, values)


@pytest.mark.parametrize("other", [">f4", "i4", "(4, 3)", "(2, 6)", "nothing"])
def test_a_file_whose_header_is_not_what_the_manifest_says(other, tmp_path):
    path = tmp_path / "rows"
    bandmf.sources.convert(list(np.arange(12, dtype="<f4").reshape(3, 4)), path)
    bandmf.sources.load(path)
    content = (path / "column_0.npy").read_bytes()
    old, new = (b"(3, 4)", other.encode()) if "(" in other else (b"<f4", other.encode())
    if other == "i4":
        new = b"<i4"
    changed = content.replace(old, new) if other != "nothing" else bytes(256) + content[256:]
    assert changed != content and len(changed) == len(content)
    (path / "column_0.npy").write_bytes(changed)
    with pytest.raises(ValueError, match="byte order.*not what the file is"):
        bandmf.sources.load(path)


X, Y, W = np.arange(3.0), np.int64(4), np.float32(0.5)


@pytest.mark.parametrize(
    ("element", "expected"),
    [
        (X, ["x"]),
        ((X,), ["x"]),
        ((X, Y), ["x", "y"]),
        ((X, None, W), ["x", "sample_weight"]),
        ((X, Y, W), ["x", "y", "sample_weight"]),
        (((X, Y),), ["x"]),
        (((X, Y, W), Y), ["x", "y"]),
        (((X, Y), None, W), ["x", "sample_weight"]),
        (((b"a", Y),), ["x"]),
        ((b"a", None, W), ["x", "sample_weight"]),
        (((X,),), ["x"]),
        ({"a": (X, b"a")}, ["x"]),
    ],
)
def test_inputs_targets_and_weights_stay_what_they_are(element, expected, tmp_path):
    rows = bandmf.sources.convert([element] * 3, tmp_path / "rows")
    given, found = unpacked(element, "the stream"), unpacked(rows[1], "the rows")
    assert list(given) == list(found) == expected
    tf.nest.assert_same_structure(given, found)
    for one, other in zip(tf.nest.flatten(given), tf.nest.flatten(found), strict=True):
        np.testing.assert_array_equal(one, other)


def test_weights_without_targets_reach_a_plan_with_and_without_decode(tmp_path):
    rows = bandmf.sources.convert(
        [(np.float32(i), None, np.float32(i / 9)) for i in range(9)], tmp_path / "rows"
    )
    seen = []

    def decode(row):
        seen.append(row)
        return row

    for store in (open_store(rows, None, None, 9), open_store(rows, None, None, 9, decode=decode)):
        columns = store.rows(np.array([3]))
        assert list(columns) == ["x", "sample_weight"]
        assert columns["sample_weight"] == np.float32(3 / 9)
    assert {len(row) for row in seen} == {3} and {row[1] for row in seen} == {None}


def test_one_input_that_is_a_tuple_is_not_taken_for_a_target(tmp_path):
    rows = bandmf.sources.convert([((b"a", i),) for i in range(9)], tmp_path / "rows")
    store = open_store(rows, None, None, 9, decode=lambda row: ((float(row[0][1]), 1.0),))
    columns = store.rows(np.array([3]))
    assert list(columns) == ["x"] and [part.tolist() for part in columns["x"]] == [[3.0], [1.0]]


def test_pickled_rows_of_a_relative_path_are_found_from_elsewhere(tmp_path, monkeypatch):
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path)
    rows = pickle.dumps(bandmf.sources.convert([1, 2, 3], "rows"))
    loaded = pickle.dumps(bandmf.sources.load("rows"))
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert [pickle.loads(again)[2] for again in (rows, loaded)] == [3, 3]


MOST_AXES = 64 if np.lib.NumpyVersion(np.__version__) >= "2.0.0" else 32


@pytest.mark.parametrize(
    ("first", "error", "match"),
    [
        ({3: 1}, TypeError, "keys of dicts.*`x`"),
        ((1, {3: 1}), TypeError, "keys of dicts.*`y`"),
        (np.ones((1,) * MOST_AXES), ValueError, "`x` to have fewer axes"),
    ],
)
def test_what_cannot_be_stored_is_refused_at_the_first_row(first, error, match, tmp_path):
    taken = []

    def stream():
        for number in range(3):
            taken.append(number)
            yield first

    with pytest.raises(error, match=match):
        bandmf.sources.convert(stream(), tmp_path / "rows")
    assert taken == [0] and not list(tmp_path.iterdir())


def test_strings_as_objects_are_encoded_in_every_row(tmp_path):
    stream = [np.array(word, object) for word in ("a", "\N{EURO SIGN}", b"c\0")]
    rows = bandmf.sources.convert(stream, tmp_path / "rows")
    assert [rows[i] for i in range(3)] == [b"a", b"\xe2\x82\xac", b"c\0"]


def test_a_folder_that_cannot_be_synced_is_complete_all_the_same(tmp_path, monkeypatch):
    def fail(folder):
        raise OSError(errno.EINVAL, "Invalid argument")

    monkeypatch.setattr(files, "_sync", fail)
    rows = bandmf.sources.convert([1, 2], tmp_path / "rows")
    assert rows[1] == 2 and [path.name for path in tmp_path.iterdir()] == ["rows"]


def change(path, value):
    """Returns a function that sets one entry of the manifest; a value `DROP` removes it."""

    def apply(manifest):
        at = manifest
        for key in path[:-1]:
            at = at[key]
        if value is DROP:
            del at[path[-1]]
        else:
            at[path[-1]] = value
        return manifest

    return apply


DROP = object()
LEAF = ("columns", "x")


@pytest.mark.parametrize(
    "changed",
    [
        lambda manifest: [],
        lambda manifest: None,
        lambda manifest: "text",
        *(change((key,), DROP) for key in ("num_rows", "files", "columns")),
        *(change(("num_rows",), rows) for rows in (-1, 0, 2, 4, 3.0, True, "3", None)),
        *(change(("files",), files) for files in ([], None, {}, {"column_0.npy": "280"})),
        change(("files", "column_0.npy"), None),
        change(("files", ""), 0),
        change(("files", ".."), 0),
        change(("files", "a\0b"), 0),
        change(("files", "sub/../column_0.npy"), 280),
        *(change(("columns",), columns) for columns in ([], None, {}, {"z": 1}, {"x": 1})),
        change((*LEAF,), {"dict": {}}),
        change((*LEAF,), {"tuple": 3}),
        change((*LEAF,), {"tuple": [3]}),
        *(change((*LEAF, key), DROP) for key in ("file", "dtype", "shape")),
        change((*LEAF, "file"), "manifest.json"),
        change((*LEAF, "file"), "../outside.npy"),
        change((*LEAF, "file"), ["column_0.npy"]),
        change((*LEAF, "file"), "column_1.npy"),
        *(
            change((*LEAF, "shape"), shape)
            for shape in ([2], [1, 1], [-1], [1.0], None, 0, [10**30])
        ),
        *(
            change((*LEAF, "dtype"), dtype)
            for dtype in ("float32", "int64", "string", "object", "resource", "string_ref", 3, None)
        ),
        *(change(("columns", "y", "dtype"), dtype) for dtype in ("uint8", "int64")),
        change(("columns", "y", "shape"), [1]),
        change(("files", "column_1.ends.npy"), DROP),
    ],
)
def test_a_manifest_that_was_changed_is_refused_in_plain_words(changed, tmp_path):
    path = tmp_path / "rows"
    bandmf.sources.convert([(float(i), b"abc" * i) for i in range(3)], path)
    (tmp_path / "outside.npy").write_bytes((path / "column_0.npy").read_bytes())
    bandmf.sources.load(path)
    manifest = changed(json.loads((path / "manifest.json").read_text()))
    (path / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(ValueError, match=r"^Expected .*Received: .*[Cc]onvert the data again"):
        bandmf.sources.load(path)


@pytest.mark.parametrize("text", [b"", b"{", b"\xff", b"[" * 100_000])
def test_a_manifest_that_is_no_json(text, tmp_path):
    path = tmp_path / "rows"
    bandmf.sources.convert([1.0], path)
    (path / "manifest.json").write_bytes(text)
    with pytest.raises(ValueError, match="no JSON"):
        bandmf.sources.load(path)


def test_a_file_outside_the_folder_is_never_opened(tmp_path):
    path = tmp_path / "rows"
    bandmf.sources.convert([1.0], path)
    content = (path / "column_0.npy").read_bytes()
    (tmp_path / "outside.npy").write_bytes(content)
    manifest = json.loads((path / "manifest.json").read_text())
    for name in ("../outside.npy", os.fspath(tmp_path / "outside.npy")):
        manifest["files"][name], manifest["columns"]["x"]["file"] = len(content), name
        (path / "manifest.json").write_text(json.dumps(manifest))
        with pytest.raises(ValueError, match="no file of the folder"):
            bandmf.sources.load(path)
        del manifest["files"][name]


@pytest.mark.parametrize("ends", [[1, 2, 4], [2, 1, 3], [-1, 2, 3], [9, 9, 3], [1, 3], "garbage"])
def test_ends_of_strings_that_were_changed(ends, tmp_path):
    path = tmp_path / "rows"
    bandmf.sources.convert([b"a", b"b", b"c"], path)
    file = path / "column_0.ends.npy"
    if ends == "garbage":
        file.write_bytes(bytes(file.stat().st_size))
    else:
        np.save(file, np.array(ends))
    manifest = json.loads((path / "manifest.json").read_text())
    manifest["files"][file.name] = file.stat().st_size
    (path / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(ValueError, match="onvert the data again"):
        rows = bandmf.sources.load(path)
        [rows[i] for i in range(3)]


@pytest.mark.skipif(os.name != "posix", reason="modes of files are those of POSIX")
def test_only_the_owner_may_read_what_was_converted(tmp_path):
    bandmf.sources.convert([1.0], tmp_path / "rows")
    assert (tmp_path / "rows").stat().st_mode & 0o777 == 0o700


def test_what_is_hashed_in_memory_and_on_disk_is_not_the_same_data_of_a_run(tmp_path, monkeypatch):
    """As docs/data.md says of converting while a run goes on."""
    stream = [(np.full(3, i, "float32"), i) for i in range(N)]
    rows = bandmf.sources.convert(stream, tmp_path / "rows")

    class Source:
        def __len__(self):
            return N

        def __getitem__(self, number):
            return stream[number]

    def digest(data, smallest):
        monkeypatch.setattr(columns, "MAPPED_BYTES", smallest)
        return open_store(data, None, None, N).digest(b"k")

    source, small, large = digest(Source(), 1 << 28), digest(rows, 1 << 28), digest(rows, 0)
    labels_in_memory = digest(rows, N * 9)
    assert source == large and len({source, small, labels_in_memory}) == 3
