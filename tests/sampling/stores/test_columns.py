"""Arrays on disk: only rows that are drawn are read, and the digest finds what moved."""

import mmap
import os
import tracemalloc
import types
import warnings

import h5py
import numpy as np
import pytest
import tensorflow as tf

from keras_bandmf.sampling.stores import MemoryStore, columns, open_store, random_access
from keras_bandmf.sampling.stores.random_access import RandomAccessStore, digest_positions
from keras_bandmf.sampling.stores.workers import Pace
from tests.sampling.stores.test_rows import assert_same

N = 50
INDICES = np.array([7, 3, 3, 49, 0])


@pytest.fixture(autouse=True)
def _every_memory_map_is_large(monkeypatch):
    monkeypatch.setattr(columns, "MAPPED_BYTES", 0)


def arrays(dtype="float64"):
    rng = np.random.default_rng(2)
    return rng.normal(size=(N, 4, 3)).astype(dtype), rng.integers(0, 3, N), rng.random(N)


def mapped(path, array):
    np.save(path, array)
    return np.load(path, mmap_mode="r")


class Lazy:
    """An array that NumPy cannot read, which records what is read."""

    def __init__(self, array):
        self.array, self.read = array, []
        self.shape, self.dtype = array.shape, array.dtype

    def __getitem__(self, number):
        self.read.append(number)
        return self.array[number]


def in_hdf5(path, array):
    file = h5py.File(path, "w")
    return file.create_dataset("x", data=array, chunks=(7, *array.shape[1:]))


def in_zarr(path, array):
    zarr = pytest.importorskip("zarr")
    stored = zarr.create_array(os.fspath(path), shape=array.shape, dtype=array.dtype)
    stored[...] = array
    return stored


KINDS = {
    "mapped": mapped,
    "view": lambda path, array: np.asarray(mapped(path, array))[:],
    "hdf5": in_hdf5,
    "zarr": in_zarr,
    "lazy": lambda path, array: Lazy(array),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", ["float64", "uint8"])
def test_rows_are_those_of_the_same_array_in_memory(kind, dtype, tmp_path):
    x, y, weight = arrays(dtype)
    on_disk = KINDS[kind](tmp_path / "x.npy", x)
    store = open_store({"a": on_disk, "b": [y]}, y, weight, N, class_weight={1: 3.0}, workers=2)
    memory = MemoryStore.read({"a": x, "b": [y]}, y, weight, N, class_weight={1: 3.0})
    assert isinstance(store, RandomAccessStore)
    assert store.spec() == memory.spec()
    for indices in (INDICES, np.arange(N), np.array([], int)):
        assert_same(store.rows(indices), memory.rows(indices))


def test_preprocess_never_sees_two_rows_of_a_step():
    x = np.arange(N * 2, dtype=np.float32).reshape(N, 2)
    x[[0, -1]] = N * 2.0  # the two rows that are looked at have the largest entry in common

    def preprocess(x):
        return x / tf.reduce_max(x)

    store = open_store(Lazy(x), None, None, N, preprocess=preprocess)
    rows = store.rows(np.array([5, 0]))["x"]
    np.testing.assert_array_equal(rows[0], store.rows(np.array([5]))["x"][0])


def test_preprocess_gets_the_rows_of_a_batch_one_by_one():
    x, y, _ = arrays()
    sizes = []

    def preprocess(x, y):
        sizes.append(len(x))
        return x / 2, y + 1

    store = open_store(Lazy(x), y, None, N, preprocess=preprocess)
    memory = MemoryStore.read(x, y, None, N, preprocess=preprocess)
    sizes.clear()
    assert_same(store.rows(INDICES), memory.rows(INDICES))
    assert sizes == [1] * 5
    with pytest.raises(ValueError, match="each row by itself"):
        open_store(Lazy(x), None, None, N, preprocess=lambda x: x - tf.reduce_mean(x, axis=0))


def test_only_drawn_rows_are_read():
    lazy = Lazy(arrays()[0])
    store = open_store(lazy, None, None, N)
    assert set(lazy.read) == {0, N - 1}
    lazy.read.clear()
    store.rows(INDICES)
    assert set(lazy.read) == set(INDICES.tolist())


def test_small_memory_maps_are_as_arrays_in_memory(tmp_path, monkeypatch):
    x = mapped(tmp_path / "x.npy", arrays("float32")[0])
    monkeypatch.setattr(columns, "MAPPED_BYTES", x.nbytes + 1)
    store = open_store(x, None, None, N)
    assert isinstance(store, MemoryStore)
    assert store.digest(b"k") == MemoryStore.read(np.array(x), None, None, N).digest(b"k")


@pytest.mark.parametrize("rows", [N - 1, N + 1, 0])
def test_another_number_of_rows(rows):
    with pytest.raises(ValueError, match=r"`x`.*50 rows.*public constant"):
        open_store(Lazy(np.zeros((rows, 2))), None, None, N)
    with pytest.raises(ValueError, match=r"`y`.*50 rows"):
        open_store(Lazy(np.zeros((N, 2))), np.zeros(rows), None, N)


def test_an_array_that_grows_is_noticed_when_reading_begins(tmp_path):
    file = h5py.File(tmp_path / "x.h5", "w")
    x = file.create_dataset("x", data=np.zeros((N, 2)), maxshape=(None, 2))
    store = open_store(x, None, None, N)
    x.resize(N + 1, axis=0)
    with pytest.raises(ValueError, match=r"x.shape=\(51, 2\)"), store.reader():
        pass


def test_a_file_that_became_shorter_is_noticed_and_a_removed_one_goes_on(tmp_path):
    path = tmp_path / "x.npy"
    store = open_store(mapped(path, np.ones((N, 2000))), None, None, N)
    with open(path, "r+b") as file:
        file.truncate(1000)
    with pytest.raises(ValueError, match="file of `x`.*Received: 1000 bytes"):
        store.rows(INDICES)
    path = tmp_path / "y.npy"
    store = open_store(mapped(path, np.ones((N, 2000))), None, None, N)
    path.unlink()
    assert store.rows(INDICES)["x"].all()


def failing(number):
    if number == 23:
        raise OSError("cannot read")
    return np.zeros(2)


@pytest.mark.parametrize(
    ("row", "error", "match"),
    [
        (failing, RuntimeError, "Row 23 of `x` cannot be read: OSError: cannot read"),
        (lambda i: np.zeros(3 if i == 23 else 2), ValueError, r"row 23 of `x`.*\(3,\)"),
        (lambda i: np.zeros(2, int if i == 23 else float), TypeError, "row 23 of `x`.*int64"),
        (lambda i: 0.0 if i == 23 else np.zeros(2), ValueError, r"row 23 of `x`.*\(\)"),
    ],
)
def test_a_bad_row_is_named(row, error, match):
    class Bad(Lazy):
        def __getitem__(self, number):
            return row(number)

    store = open_store(Bad(np.zeros((N, 2))), None, None, N)
    with pytest.raises(error, match=match):
        store.rows(np.arange(N))


def test_weights_on_disk_are_checked_when_they_are_drawn():
    weight = np.ones(N)
    weight[17] = np.inf
    store = open_store(np.zeros(N), None, Lazy(weight), N)
    assert store.rows(np.arange(17))["sample_weight"].dtype == np.float32
    with pytest.raises(ValueError, match="finite"):
        store.rows(np.array([17]))


def test_a_digest_of_few_rows_takes_them_all():
    x, y, _ = arrays()
    key = b"k" * 16
    first = open_store(Lazy(x), y, None, N).digest(key)
    assert first == open_store(Lazy(x.copy()), y, None, N).digest(key) and len(first) == 32
    swapped, label = x.copy(), y.copy()
    swapped[[3, 7]] = swapped[[7, 3]]
    label[5] += 1
    others = [
        open_store(Lazy(swapped), y, None, N).digest(key),
        open_store(Lazy(x), label, None, N).digest(key),
        open_store(Lazy(x.astype("float32")), y, None, N).digest(b"l" * 16),
        open_store(Lazy(x[:-1]), y[:-1], None, N - 1).digest(key),
        open_store(Lazy(x), None, None, N).digest(key),
        MemoryStore.read(x, y, None, N).digest(key),
    ]
    assert len({first, *others}) == 1 + len(others)


def test_positions_of_a_digest_are_secret_uniform_and_few():
    positions = digest_positions(b"k" * 16, 10**8)
    assert positions.shape == (1024,) and (np.diff(positions) >= 0).all()
    assert len(set(positions.tolist()) & set(digest_positions(b"l" * 16, 10**8).tolist())) < 5
    np.testing.assert_array_equal(positions, digest_positions(b"k" * 16, 10**8))
    # Uniform: chi-square over ten tenths, false-alarm rate below 1e-6 (bound 45 at 9 degrees).
    counts = np.bincount(positions // 10**7, minlength=10)
    assert ((counts - 102.4) ** 2 / 102.4).sum() < 45


def test_the_digest_misses_what_moved_as_rarely_as_it_says(monkeypatch):
    """With 32 positions and a tenth of the rows changed: (1 - 0.1)^32 = 3.4 %."""
    monkeypatch.setattr(random_access, "DIGEST_ROWS", 32)
    x = np.arange(1000.0)
    changed = x.copy()
    changed[100:200] = x[100:200][::-1]
    one, other = open_store(Lazy(x), None, None, 1000), open_store(Lazy(changed), None, None, 1000)
    keys = [bytes([i, j]) for i in range(20) for j in range(20)]
    missed = sum(one.digest(key) == other.digest(key) for key in keys)
    # Binomial(400, 0.034): mean 13.7; 38 and more have probability 1e-8.
    assert 0 < missed < 38
    shuffled = open_store(Lazy(np.roll(x, 1)), None, None, 1000)
    assert all(one.digest(key) != shuffled.digest(key) for key in keys)


def test_strings_in_memory_beside_an_array_on_disk_are_part_of_the_digest():
    x, y, _ = arrays()

    def preprocess(x):
        return x["a"]

    def digest(words):
        store = open_store({"a": Lazy(x), "w": words}, None, None, N, preprocess=preprocess)
        return store.digest(b"k")

    words = np.array(["a", "bc"] * 25)
    assert digest(words) == digest(words.copy()) != digest(words[::-1].copy())


class Clock:
    """Seconds that the test sets."""

    def __init__(self):
        self.now = 0.0

    def __call__(self):
        return self.now

    def let(self, seconds):
        self.now += seconds


@pytest.mark.parametrize(("reading", "waiting", "slow"), [(1.0, 0.01, True), (1.0, 0.5, False)])
def test_a_warning_with_numbers_where_training_waits_for_rows(reading, waiting, slow, recwarn):
    clock = Clock()
    pace = Pace(clock)
    for _ in range(50):
        assert pace.timed(lambda: clock.let(reading), rows=8, workers=2) is None
        clock.let(waiting)
    messages = [str(warning.message) for warning in recwarn]
    assert len(messages) == slow
    if slow:
        assert "99 %" in messages[0] and "1000 ms a batch or 8 rows a second" in messages[0]
        assert "2 threads" in messages[0] and "workers=" in messages[0]


def test_a_quick_start_is_no_reason_to_warn(recwarn):
    clock = Clock()
    pace = Pace(clock)
    for _ in range(4):
        pace.timed(lambda: clock.let(9.0), rows=8, workers=1)
    assert not list(recwarn)


def test_a_mapping_is_told_that_rows_are_random():
    """Reading ahead makes random rows some hundred times slower."""

    class Base(mmap.mmap):
        advice: list[int] = []

        def madvise(self, option, *args):
            self.advice.append(option)

    if not hasattr(mmap, "MADV_RANDOM"):
        pytest.skip("this system takes no advice")
    mapping = types.SimpleNamespace(base=Base(-1, 4096))
    columns._read_single_pages(mapping)
    assert Base.advice == [mmap.MADV_RANDOM]
    columns._read_single_pages(types.SimpleNamespace(base=None))


def odd_offset(path, array):
    path.write_bytes(b"." + array.tobytes())
    return np.memmap(path, array.dtype, "r", 1, array.shape)


def fortran(path, array):
    return mapped(path, np.asfortranarray(array))


VIEWS = {
    "fortran": (fortran, lambda array: array),
    "column": (mapped, lambda array: array[:, 1:5]),
    "every second": (mapped, lambda array: array[::2]),
    "reversed": (mapped, lambda array: array[::-1]),
    "odd offset": (odd_offset, lambda array: array),
    "big-endian": (lambda path, array: mapped(path, array.astype(">f4")), lambda array: array),
    "whole": (mapped, lambda array: array),
}


@pytest.mark.filterwarnings("ignore:.*Fortran order")
@pytest.mark.parametrize("kind", VIEWS)
def test_only_drawn_rows_are_copied_of_any_view_of_a_file(kind, tmp_path):
    write, view = VIEWS[kind]
    x = np.random.default_rng(0).normal(size=(20_000, 8, 4)).astype("float32")
    on_disk, x = view(write(tmp_path / "x.npy", x)), view(x)
    store = open_store(on_disk, None, None, len(x), workers=1)
    assert isinstance(store, RandomAccessStore)
    indices = np.array([7, 3, 3, len(x) - 1, 0])
    with store.reader() as reader:
        reader.rows(indices)
        tracemalloc.start()
        try:
            rows = reader.rows(indices)
            peak = tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()
    np.testing.assert_array_equal(rows["x"], x[indices])
    assert peak < x.nbytes / 4


def test_an_array_in_memory_beside_one_on_disk_is_not_copied_as_a_whole():
    y = np.frombuffer(b"." + np.arange(200_000.0, dtype="f4").tobytes(), "f4", offset=1)
    store = open_store(Lazy(np.zeros(len(y))), y, None, len(y), workers=1)
    with store.reader() as reader:
        reader.rows(INDICES)
        tracemalloc.start()
        try:
            rows = reader.rows(INDICES)
            peak = tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()
    np.testing.assert_array_equal(rows["y"], y[INDICES])
    assert peak < y.nbytes / 4


def test_a_warning_for_rows_that_lie_scattered_over_the_file(tmp_path):
    x = np.ones((N, 4, 3), "float32")
    with pytest.warns(UserWarning, match=r"`x\['a'\]`.*Fortran order.*ascontiguousarray"):
        open_store({"a": fortran(tmp_path / "f.npy", x)}, None, None, N)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        c = mapped(tmp_path / "c.npy", x)
        row = mapped(tmp_path / "row.npy", x[:1])
        one = fortran(tmp_path / "one.npy", x[:, :1, :1])
        for kind in (c, c[::-1], c[:, 1:3], c[:, :, 1], one, np.broadcast_to(row, x.shape)):
            open_store(kind, None, None, N)
        open_store(fortran(tmp_path / "1.npy", x[:1]), None, None, 1)


def test_masked_values_on_disk_are_refused_as_in_memory(tmp_path):
    x = mapped(tmp_path / "x.npy", np.ones((N, 2), "float32"))
    masked = np.ma.array(x, mask=np.eye(N, 2, dtype=bool), copy=False)
    for y in (None, Lazy(np.zeros(N))):
        with pytest.raises(TypeError, match="`x`.*MaskedArray"):
            open_store(masked, y, None, N)


@pytest.mark.parametrize("kind", ["hdf5", "lazy", "zarr"])
@pytest.mark.parametrize("dtype", [">f4", ">f8", ">i8", ">u2", "<f4"])
def test_single_numbers_of_any_byte_order(kind, dtype, tmp_path):
    y = np.arange(N).astype(dtype)
    store = open_store(np.zeros(N), KINDS[kind](tmp_path / "y", y), None, N)
    found = store.rows(INDICES)["y"]
    np.testing.assert_array_equal(np.asarray(tf.convert_to_tensor(found)), y[INDICES])


def lengths(words):
    return tf.strings.length(words)


@pytest.mark.parametrize("kind", ["hdf5", "lazy"])
def test_strings_shorter_than_the_width_of_their_array(kind, tmp_path):
    words = np.array([b"abcd"[: i % 5] for i in range(N)], "S4")
    store = open_store(KINDS[kind](tmp_path / "x", words), None, None, N, preprocess=lengths)
    assert store.rows(np.arange(N))["x"].tolist() == [i % 5 for i in range(N)]
    unicode = np.array(["abcd"[: i % 5] for i in range(N)])
    store = open_store(Lazy(unicode), None, None, N, preprocess=lengths)
    assert store.rows(np.arange(N))["x"].tolist() == [i % 5 for i in range(N)]


@pytest.mark.parametrize(
    ("declared", "value"),
    [
        ("S4", b"abcde"),
        ("S4", "abc"),
        ("U4", b"abc"),
        ("f8", np.float32(1)),
        ("f8", 1),
        ("i8", np.uint64(1)),
        ("f4", np.float64(1)),
        ("i8", np.int32(1)),
        ("f8", True),
    ],
)
def test_single_values_of_another_type_than_their_array(declared, value):
    class Bad(Lazy):
        def __getitem__(self, number):
            return value if number == 23 else self.array[number]

    preprocess = lengths if declared[0] in "SU" else None
    store = open_store(Bad(np.ones(N).astype(declared)), None, None, N, preprocess=preprocess)
    with pytest.raises(TypeError, match="row 23 of `x`"):
        store.rows(np.arange(N))


@pytest.mark.parametrize("lazy", [False, True])
def test_products_of_weights_that_are_not_finite_are_refused(lazy):
    y, weights = np.arange(N) % 2, np.full(N, 0.5)
    weights[17] = 1e38
    limit = 2.0**128 - 2.0**103  # half-way from the largest float32 to the next power of two
    x = Lazy(np.zeros(N)) if lazy else np.zeros(N)

    def row(class_weight, sample_weight=weights):
        store = open_store(x, y, sample_weight, N, class_weight=class_weight)
        return store.rows(np.array([17]))["sample_weight"][0]

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(ValueError, match=r"`sample_weight` times `class_weight`.*finite"):
            row({1: 100.0})
        for infinite in (limit, 1e39):
            for sample_weight in (weights, np.zeros(N), None):
                with pytest.raises(ValueError, match=r"class_weight\[1\].*below"):
                    row({1: infinite}, sample_weight)
        assert row({1: 2.0}) == np.float32(2e38)
        assert row({1: np.nextafter(limit, 0)}, None) == np.finfo(np.float32).max
