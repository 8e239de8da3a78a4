"""Sources of single rows: what they may return, what is named when they fail, and threads."""

import collections
import concurrent.futures
import pickle
import sys
import threading
import time
import types

import keras
import numpy as np
import pytest
import tensorflow as tf

from keras_bandmf import PrivacyError
from keras_bandmf.sampling.stores import MemoryStore, choice, open_store
from keras_bandmf.sampling.stores.workers import THREAD_NAME, Workers

N = 50


class Source:
    """Rows made by a function, which counts what is read."""

    def __init__(self, row, length=N):
        self.row, self.length, self.read = row, length, []

    def __len__(self):
        return self.length

    def __getitem__(self, number):
        self.read.append(number)
        return self.row(number)


class Together(Source):
    """A source that also returns several rows at once."""

    def __getitems__(self, numbers):
        self.read.extend(numbers)
        return [self.row(number) for number in numbers]


def opened(row, kind=Source, num_examples=N, **options):
    source = kind(row) if callable(row) else row
    return open_store(source, None, None, num_examples, **options)


def data():
    rng = np.random.default_rng(5)
    return rng.normal(size=(N, 3)).astype("float32"), np.arange(N) % 4, rng.random(N)


def assert_same(rows, expected):
    assert rows.keys() == expected.keys()
    for ours, theirs in zip(keras.tree.flatten(rows), keras.tree.flatten(expected), strict=True):
        assert ours.dtype == theirs.dtype
        np.testing.assert_array_equal(ours, theirs)


@pytest.mark.parametrize("kind", [Source, Together])
@pytest.mark.parametrize("workers", [None, 1, 3])
@pytest.mark.parametrize("columns", [1, 2, 3])
def test_rows_are_those_of_the_same_arrays_in_memory(kind, workers, columns):
    arrays = data()[:columns]
    store = opened(lambda i: tuple(array[i] for array in arrays), kind, workers=workers)
    memory = MemoryStore.read(*arrays, *[None] * (3 - columns), N)
    assert store.spec() == memory.spec() and store.num_examples == N
    for indices in ([7, 3, 3, 49], np.arange(N)[::-1], [0], []):
        assert_same(store.rows(np.array(indices, int)), memory.rows(np.array(indices, int)))


def test_structures_numbers_lists_and_tensors():
    def row(i):
        return {"a": [i, i + 1], "b": (float(i), tf.constant(i)), "c": bool(i % 2)}, i

    rows = opened(row, workers=2).rows(np.array([4, 1]))
    assert rows["x"]["a"].tolist() == [[4, 5], [1, 2]]
    assert rows["x"]["b"][0].dtype == np.float32 and rows["x"]["b"][0].tolist() == [4, 1]
    assert rows["x"]["b"][1].dtype == np.int32
    assert rows["x"]["c"].tolist() == [False, True] and rows["y"].dtype == np.int64


def test_decode_turns_elements_into_rows():
    def decode(element):
        return {"pixels": np.frombuffer(element["raw"], np.uint8)}, element["label"]

    store = opened(lambda i: {"raw": bytes([i, 1]), "label": i, "id": str(i)}, decode=decode)
    rows = store.rows(np.array([9, 2]))
    assert rows["x"]["pixels"].tolist() == [[9, 1], [2, 1]] and rows["y"].tolist() == [9, 2]


def test_only_the_rows_that_are_asked_for_are_read():
    source = Source(float)
    store = opened(source)
    assert set(source.read) == {0, N // 2, N - 1}
    source.read.clear()
    store.rows(np.array([5, 30, 5]))
    assert source.read == [5, 30]


def test_strings_need_preprocess_and_get_it_batch_by_batch():
    words = np.array(["a b", "b", "c"] * 20)[:N]
    layer = keras.layers.TextVectorization(output_sequence_length=4, vocabulary=["a", "b", "c"])

    def preprocess(x, y):
        return layer(x), y

    store = opened(lambda i: (str(words[i]), i), preprocess=preprocess)
    memory = MemoryStore.read(words, np.arange(N), None, N, preprocess=preprocess)
    assert_same(store.rows(np.array([8, 1])), memory.rows(np.array([8, 1])))
    raw = opened(lambda i: (str(words[i]), i))
    for refused in (raw.spec, lambda: raw.rows(np.array([8])), lambda: raw.digest(b"key")):
        with pytest.raises(TypeError, match="strings"):
            refused()
    assert_same(
        raw.preprocessed_by(preprocess).rows(np.array([8, 1])), store.rows(np.array([8, 1]))
    )


def test_weights_are_checked_when_rows_are_drawn():
    x, y, weight = data()
    weight[17] = np.nan
    store = opened(lambda i: (x[i], y[i], weight[i]), class_weight={1: 2.0})
    memory = MemoryStore.read(x[:17], y[:17], weight[:17], 17, class_weight={1: 2.0})
    assert_same(store.rows(np.arange(17)), memory.rows(np.arange(17)))
    with pytest.raises(ValueError, match="sample_weight.*finite"):
        store.rows(np.array([3, 17]))
    store = opened(lambda i: (x[i], y[i], -1.0 if i == 4 else 1.0))
    with pytest.raises(ValueError, match="not negative"):
        store.rows(np.arange(9))
    with pytest.raises(TypeError, match="class_weight"):
        opened(lambda i: (x[i], y[i]), class_weight=[1, 2])


@pytest.mark.parametrize("kind", [Source, Together])
@pytest.mark.parametrize(
    ("bad", "error", "match"),
    [
        (lambda: 1 / 0, RuntimeError, "Row 23 of the source cannot be read: ZeroDivisionError"),
        (lambda: np.zeros(4), ValueError, r"x of shape \(4,\) in row 23, and \(3,\) in row 0"),
        (lambda: np.zeros(3, int), TypeError, "x of int64 in row 23, and of float32 in row 0"),
        (lambda: (np.zeros(3), 1), ValueError, "one structure.*row 23"),
        (lambda: {"a": np.zeros(3)}, ValueError, "one structure|row 23"),
        (lambda: None, TypeError, "row 23"),
        (lambda: [1, [2, 3]], ValueError, "row 23.*pad lists"),
        (lambda: (1, 2, 3, 4), ValueError, "row 23 of the source.*tuple of 4"),
        (lambda: "text", TypeError, "row 23"),
    ],
)
def test_a_bad_row_is_named(bad, error, match, kind):
    store = opened(lambda i: bad() if i == 23 else np.zeros(3), kind, workers=2)
    store.rows(np.arange(23))
    with pytest.raises(error, match=match):
        store.rows(np.arange(N))
    assert not reading_threads()


def test_a_failing_decode_names_the_row():
    store = opened(float, decode=lambda element: 1 / (element - 3))
    with pytest.raises(RuntimeError, match="`decode` fails on row 3 of the source: ZeroDivision"):
        store.rows(np.array([1, 3]))


def test_a_source_whose_getitems_returns_too_few():
    class Short(Together):
        def __getitems__(self, numbers):
            return super().__getitems__(numbers)[: None if self.whole else 1]

    source = Short(float)
    source.whole = False
    with pytest.raises(PrivacyError, match="__getitems__.*Received: 1"):
        opened(source)
    source.whole = True
    store = opened(source, workers=1)
    source.whole = False
    with pytest.raises(PrivacyError, match="__getitems__.*Received: 1"):
        store.rows(np.arange(10))


@pytest.mark.parametrize("length", [0, N - 1, N + 1])
def test_another_length_is_refused(length):
    with pytest.raises(ValueError, match=f"num_examples=50.*length {length}.*public constant"):
        opened(Source(float, length))


def test_the_length_is_checked_whenever_reading_begins():
    source = Source(float)
    store = opened(source)
    with store.reader() as reader:
        reader.rows(np.arange(3))
    source.length = N + 1
    with pytest.raises(ValueError, match="length 51"), store.reader():
        pass
    with pytest.raises(ValueError, match="length 51"):
        store.digest(b"key")


def test_rows_that_change_when_read_again_are_refused():
    rng = np.random.default_rng(0)
    with pytest.raises(ValueError, match="same whenever they are read"):
        opened(lambda i: rng.normal(size=3))


@pytest.mark.parametrize("name", ["y", "sample_weight"])
def test_columns_beside_a_source(name):
    given = {"y": None, "sample_weight": None} | {name: np.ones(N)}
    with pytest.raises(ValueError, match=f"`{name}` to be None"):
        open_store(Source(float), **given, num_examples=N)


class Batches(keras.utils.PyDataset):
    """Batches of rows."""

    def __len__(self):
        return 5

    def __getitem__(self, number):
        return np.zeros((10, 3))


class Loader:
    """As a DataLoader of PyTorch: no row numbers, but what it loads from."""

    dataset = Source(float)

    def __len__(self):
        return 5

    def __iter__(self):
        return iter([np.zeros((10, 3))] * 5)


@pytest.mark.parametrize(
    ("x", "match"),
    [
        (Batches(), "PyDataset, which returns batches.*`__getitem__"),
        (Loader(), r"yields batches.*`x.dataset`"),
        ({"a": Source(float)}, r"x\['a'\] of type Source"),
        ((i for i in range(N)), "row numbers"),
    ],
)
def test_what_has_no_rows_is_refused_with_a_way_out(x, match):
    with pytest.raises(TypeError, match=match):
        open_store(x, None, None, N)


@pytest.mark.parametrize("x", [np.zeros(N), tf.data.Dataset.range(N), {"a": np.zeros(N)}])
def test_decode_is_for_sources(x):
    with pytest.raises(ValueError, match="`decode` is for a source of rows.*preprocess"):
        open_store(x, None, None, N, decode=lambda element: element)


@pytest.mark.parametrize(
    ("options", "error", "match"),
    [
        ({"workers": 0}, ValueError, "workers"),
        ({"workers": 2.0}, TypeError, "workers"),
        ({"decode": "jpeg"}, TypeError, "decode"),
        ({"preprocess": 3}, TypeError, "preprocess"),
    ],
)
def test_bad_options(options, error, match):
    with pytest.raises(error, match=match):
        opened(float, **options)


def reading_threads():
    return [t for t in threading.enumerate() if t.name.startswith(THREAD_NAME)]


def test_threads_read_at_the_same_time_only_where_that_is_promised():
    """Decoding runs in all threads either way."""
    for workers, at_once in ((4, True), (None, False)):
        inside, most, lock = [0], [0], threading.Lock()
        barrier = threading.Event()

        def row(i, inside=inside, most=most, lock=lock, barrier=barrier):
            with lock:
                inside[0] += 1
                most[0] = max(most[0], inside[0])
                if most[0] > 1:
                    barrier.set()
            barrier.wait(0.02)
            with lock:
                inside[0] -= 1
            return float(i)

        opened(row, workers=workers).rows(np.arange(8))
        assert (most[0] > 1) == at_once


def test_threads_end_with_the_reader():
    store = opened(float, workers=3)
    with store.reader() as reader:
        reader.rows(np.arange(30))
        assert reading_threads()
    assert not reading_threads()
    with store.closing_readers():
        context = store.reader()
        reader = context.__enter__()
        reader.rows(np.arange(30))
        assert reading_threads()
    assert not reading_threads()
    with pytest.raises(RuntimeError, match="no longer read"):
        reader.rows(np.arange(3))
    context.__exit__(None, None, None)


def test_readers_of_others_stay_open():
    store = opened(float, workers=3)
    with store.reader() as reader:
        with store.closing_readers():
            pass
        assert reader.rows(np.array([4]))["x"].tolist() == [4.0]


def module_row(i):
    return float(i)


def test_a_store_can_be_pickled():
    store = opened(Source(module_row))
    again = pickle.loads(pickle.dumps(store))
    assert again.rows(np.array([3]))["x"].tolist() == [3.0]
    assert again.digest(b"k") == store.digest(b"k")


@pytest.mark.parametrize("length", [1, 2, 3])
def test_few_rows(length):
    store = opened(Together(float, length), num_examples=length)
    numbers = np.arange(length)[::-1]
    assert store.rows(numbers)["x"].tolist() == numbers.tolist()


def most_at_once(open_it):
    """How many threads are in the source at the same time, of 8 rows read."""
    inside, most, lock, met = [0], [0], threading.Lock(), threading.Event()

    def row(i):
        with lock:
            inside[0] += 1
            most[0] = max(most[0], inside[0])
            if most[0] > 1:
                met.set()
        met.wait(0.02)
        with lock:
            inside[0] -= 1
        return float(i)

    open_it(Source(row)).rows(np.arange(8))
    return most[0]


def test_grain_around_a_source_is_called_by_one_thread_at_a_time():
    grain = pytest.importorskip("grain")

    def opened_in_grain(source):
        return open_store(grain.MapDataset.source(source), None, None, N)

    assert most_at_once(opened_in_grain) == 1


def test_only_known_types_are_read_by_several_threads(monkeypatch):
    module = types.ModuleType("grain.sources")
    module.ArrayRecordDataSource = type("ArrayRecordDataSource", (Source,), {})
    monkeypatch.setitem(sys.modules, "grain.sources", module)
    kind = module.ArrayRecordDataSource
    below = type("Mine", (kind,), {"__module__": "grain.sources"})
    named = type("ArrayRecordDataSource", (Source,), {"__module__": "grain.sources"})
    for other, at_once in ((kind, True), (below, False), (named, False), (Source, False)):
        assert choice._bears_threads(other(float)) == at_once


def test_one_worker_is_no_promise():
    """Two iterators, each with one thread, may read at the same time."""
    inside, most = [0], [0]

    def row(i):
        inside[0] += 1
        most[0] = max(most[0], inside[0])
        time.sleep(0.002)
        inside[0] -= 1
        return float(i)

    store = opened(row, workers=1)
    threads = [threading.Thread(target=store.rows, args=(np.arange(5),)) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most == [1]


def test_decoding_runs_in_several_threads(monkeypatch):
    monkeypatch.setattr(choice, "default_workers", lambda: 4)
    barrier = threading.Barrier(2, timeout=20)
    together = [False]

    def decode(element):
        if together[0]:
            barrier.wait()
        return float(element[0])

    store = opened(lambda i: bytes([i]), decode=decode)
    together[0] = True
    assert store.rows(np.array([3, 4]))["x"].tolist() == [3.0, 4.0]


def test_a_failed_row_ends_the_other_parts_at_their_next_row():
    started = threading.Event()
    counts = collections.Counter()

    def row(i):
        if not started.is_set():
            return float(i)
        counts[i] += 1
        if i == 0:
            raise OSError("gone")
        time.sleep(0.002)
        return float(i)

    store = opened(Source(row, 4000), num_examples=4000, workers=2)
    started.set()
    with pytest.raises(RuntimeError, match="Row 0 of the source"):
        store.rows(np.arange(4000))
    assert sum(counts.values()) < 1500  # the second part alone has 1000 rows


def test_closing_ends_parts_that_wait_and_parts_that_run():
    """A hang in this test is the error that it looks for."""
    reading = threading.Event()

    def row(i):
        reading.set()
        time.sleep(0.002)
        return float(i)

    store = opened(Source(row, 4000), num_examples=4000, workers=2)
    context, errors = store.reader(), []
    reader = context.__enter__()

    def read():
        try:
            reader.rows(np.arange(4000))
        except RuntimeError as error:
            errors.append(str(error))

    reading.clear()
    thread = threading.Thread(target=read, daemon=True)
    thread.start()
    reading.wait(20)
    context.__exit__(None, None, None)
    thread.join(20)
    assert not thread.is_alive()
    assert len(errors) == 1 and "no longer read" in errors[0]
    assert not reading_threads()


def test_workers_pass_on_an_error_that_looks_like_a_cancelled_part():
    workers = Workers(2)

    def fail(part, go_on):
        raise concurrent.futures.CancelledError

    with pytest.raises(concurrent.futures.CancelledError):
        workers.each(fail, [1, 2, 3])
    workers.close()
