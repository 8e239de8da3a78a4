"""Reading examples from arrays and datasets, preprocessing, weights, and gathering."""

import collections

import keras
import numpy as np
import pytest
import tensorflow as tf

from keras_bandmf.sampling import sources
from keras_bandmf.sampling.stores.memory import MemoryStore

N = 50


def read(x=None, y=None, sample_weight=None, num_examples=N, **options):
    x = np.arange(N) if x is None else x
    return MemoryStore.read(x, y, sample_weight, num_examples, **options)


def everything(store):
    return store.rows(np.arange(N))


def test_rows_of_nested_structures_in_any_order():
    rng = np.random.default_rng(0)
    pair = collections.namedtuple("Pair", "left right")
    x = {
        "a": rng.normal(size=(N, 3)),
        "b": [rng.integers(0, 9, (N, 2, 2)), rng.random(N) > 0.5],
        "c": pair(tf.constant(rng.normal(size=N), tf.bfloat16), tf.Variable(tf.range(N))),
    }
    store = read(x, (np.arange(N),))
    indices = np.array([7, 3, 3, 49])
    rows = store.rows(indices)
    np.testing.assert_array_equal(rows["x"]["a"], x["a"].astype("float32")[indices])
    assert isinstance(rows["x"]["b"], tuple)
    np.testing.assert_array_equal(rows["x"]["b"][0], x["b"][0][indices])
    assert rows["x"]["b"][1].dtype == bool
    assert isinstance(rows["x"]["c"], pair)
    assert rows["x"]["c"].left.dtype == tf.bfloat16.as_numpy_dtype
    np.testing.assert_array_equal(rows["x"]["c"].right, indices)
    assert rows["y"][0].tolist() == indices.tolist()
    assert "sample_weight" not in rows


def test_arrays_are_not_copied_unless_they_must_be():
    x = np.zeros((N, 3), "float32")
    store = read(x)
    x[4] = 1
    assert store.rows([4])["x"].all()
    for other in (np.asfortranarray(x), x.astype(float), np.zeros((N, 6), "float32")[:, ::2]):
        np.testing.assert_array_equal(everything(read(other))["x"], other)


def test_memory_maps_stay_on_disk(tmp_path):
    x = np.arange(N * 4, dtype="float32").reshape(N, 4)
    np.save(tmp_path / "x.npy", x)
    store = read(np.load(tmp_path / "x.npy", mmap_mode="r"))
    np.testing.assert_array_equal(store.rows([5, 40])["x"], x[[5, 40]])


def test_no_rows():
    store = read({"a": np.ones((N, 2)), "b": np.ones(N, bool)})
    assert store.rows([])["x"]["a"].shape == (0, 2)


@pytest.mark.parametrize(
    "indices, error", [([-1], ValueError), ([N], ValueError), ([0.5], TypeError), (3, TypeError)]
)
def test_bad_indices(indices, error):
    with pytest.raises(error, match="indices"):
        read().rows(indices)


def test_pandas_like_objects():
    class Frame:
        def __array__(self, dtype=None, copy=None):
            return np.ones((N, 2))

    assert everything(read(Frame()))["x"].shape == (N, 2)


# ---- datasets


def arrays():
    rng = np.random.default_rng(1)
    return rng.normal(size=(N, 3)).astype("float32"), np.arange(N), rng.random(N)


@pytest.mark.parametrize("columns", [1, 2, 3])
@pytest.mark.parametrize("chunk", [7, 1024])
def test_datasets_of_single_examples(columns, chunk, monkeypatch):
    monkeypatch.setattr(sources, "_CHUNK_ROWS", chunk)
    given = arrays()[:columns]
    rows = everything(read(tf.data.Dataset.from_tensor_slices(given)))
    assert list(rows) == ["x", "y", "sample_weight"][:columns]
    for name, array in zip(rows, given, strict=True):
        np.testing.assert_allclose(rows[name], array, rtol=1e-6)


def test_datasets_of_x_alone_and_of_structures():
    x, y, _ = arrays()
    alone = everything(read(tf.data.Dataset.from_tensor_slices(x)))
    assert list(alone) == ["x"]
    nested = tf.data.Dataset.from_tensor_slices(({"a": x, "b": (y, y)}, {"t": y}))
    rows = everything(read(nested))
    np.testing.assert_array_equal(rows["x"]["b"][1], y)
    np.testing.assert_array_equal(rows["y"]["t"], y)


def test_a_dataset_is_read_once():
    reads = []

    def generate():
        reads.append(1)
        yield from range(N)

    dataset = tf.data.Dataset.from_generator(generate, output_signature=tf.TensorSpec((), tf.int32))
    store = read(dataset)  # unknown cardinality: counted while it is read
    everything(store), everything(store)
    assert reads == [1]


def test_an_unbatched_dataset_and_parallel_maps_keep_the_order():
    dataset = tf.data.Dataset.range(N).batch(8).unbatch()
    options = tf.data.Options()
    options.deterministic = False
    dataset = dataset.map(lambda i: i * 2, num_parallel_calls=4).with_options(options)
    assert everything(read(dataset))["x"].tolist() == list(range(0, 2 * N, 2))


@pytest.mark.parametrize(
    "dataset, match",
    [
        (lambda: tf.data.Dataset.range(N - 1), "num_examples=50.*49"),
        (lambda: tf.data.Dataset.range(N).batch(10), "a dataset of 5.*unbatch"),
        (lambda: tf.data.Dataset.range(N).repeat(), "infinite"),
        (lambda: tf.data.Dataset.range(N).filter(lambda i: i > 3), "Received: 46"),
        (lambda: tf.data.Dataset.range(N + 9).filter(lambda i: i > 3), "Received: more"),
        (lambda: tf.data.Dataset.range(10**12).filter(lambda i: i >= 0), "Received: more"),
        (lambda: tf.data.Dataset.range(N).map(lambda i: tf.range(i)), "one shape"),
        (lambda: tf.data.Dataset.range(N).map(lambda i: (i, i, 1.0, i)), "tuple of 4"),
    ],
)
def test_bad_datasets(dataset, match):
    with pytest.raises(ValueError, match=match):
        read(dataset())


def test_shapes_that_change_between_chunks(monkeypatch):
    monkeypatch.setattr(sources, "_CHUNK_ROWS", 10)
    dataset = tf.data.Dataset.range(N).map(lambda i: tf.zeros([1 + i // 20]))
    with pytest.raises(ValueError, match="one shape"):
        read(dataset)


def test_ragged_and_sparse_datasets():
    ragged = tf.data.Dataset.range(N).map(
        lambda i: {"w": tf.RaggedTensor.from_row_lengths([1], [1])}
    )
    with pytest.raises(TypeError, match=r"x\['w'\].*RaggedTensorSpec"):
        read(ragged)
    sparse = tf.data.Dataset.range(N).map(lambda i: (i, tf.sparse.eye(2)))
    with pytest.raises(TypeError, match="`y`.*SparseTensorSpec"):
        read(sparse)


@pytest.mark.parametrize("name", ["y", "sample_weight"])
def test_columns_beside_a_dataset(name):
    with pytest.raises(ValueError, match=f"`{name}` to be None"):
        read(tf.data.Dataset.range(N), **{name: np.ones(N)})


# ---- bad arrays


@pytest.mark.parametrize(
    "change, match",
    [
        (dict(x=np.ones((N + 1, 2))), r"`x`.*\(51, 2\).*num_examples=50"),
        (dict(x={"a": np.ones(N), "b": [np.ones(3)]}), r"x\['b'\]\[0\].*\(3,\)"),
        (dict(y=np.ones(N - 1)), "`y`.*public constant"),
        (dict(y=np.float32(3)), r"`y`.*shape=\(\)"),
        (dict(sample_weight=np.ones(1)), "sample_weight"),
        (dict(x={}), "`x` to hold an array"),
        (dict(y=[]), "`y` to hold an array"),
        (dict(sample_weight=-np.ones(N)), "sample_weight.*negative"),
        (dict(sample_weight=[np.ones(N), np.full(N, np.nan)]), r"sample_weight\[1\].*finite"),
        (dict(sample_weight=np.full(N, np.inf)), "finite"),
    ],
)
def test_arrays_with_bad_values(change, match):
    with pytest.raises(ValueError, match=match):
        read(**change)


def generator():
    yield 1


@pytest.mark.parametrize(
    "change, match",
    [
        (dict(x=[1, None, 3]), r"x\[0\].*int"),
        (dict(x=generator()), "generator"),
        (dict(x="text"), "str"),
        (dict(y=[np.ones(N), None]), r"y\[1\].*NoneType"),
        (dict(x=tf.ragged.constant([[1], [2, 3]])), "dense.*RaggedTensor"),
        (dict(y={"s": tf.sparse.eye(N)}), r"y\['s'\].*SparseTensor"),
        (dict(x=np.ma.masked_array(np.ones(N))), "MaskedArray"),
        (dict(x=keras.Input((3,))), "KerasTensor"),
        (dict(x=np.array([{}] * N)), "entry of type dict"),
        (dict(x=np.array([[1], [2, 3]] * 25, object)), "Pad rows"),
        (dict(x=np.zeros(N, "datetime64[s]")), "datetime64"),
        (dict(x=np.array(["a"] * N)), "of strings.*preprocess"),
        (dict(y={"t": np.array([b"a"] * N)}), r"y\['t'\].*of strings"),
        (dict(sample_weight=np.array(["a"] * N)), "`sample_weight` to hold numbers"),
        (dict(sample_weight=np.ones(N, complex)), "sample_weight.*complex"),
    ],
)
def test_arrays_of_bad_types(change, match):
    with pytest.raises(TypeError, match=match):
        # Strings are kept for the preprocessor of a task, and refused where they are drawn.
        everything(read(**change))


def test_no_x_and_scipy_sparse():
    with pytest.raises(TypeError, match="`x`"):
        MemoryStore.read(None, np.ones(N), None, N)
    sparse = pytest.importorskip("scipy.sparse")
    for kind in (sparse.csr_matrix, sparse.coo_array):
        with pytest.raises(TypeError, match="dense"):
            read(kind(np.eye(N)))


# ---- preprocessing


@pytest.mark.parametrize("chunk", [16, 1024])
def test_preprocess_once_in_chunks(chunk, monkeypatch):
    monkeypatch.setattr(sources, "_CHUNK_ROWS", chunk)
    sizes = []

    def preprocess(x, y):
        sizes.append(int(tf.shape(x)[0]))
        return {"half": x / 2, "two": [x, x]}, y + 1

    x, y, weight = arrays()
    store = read(x, y, weight, preprocess=preprocess)
    rows, again = everything(store), everything(store)
    assert sum(sizes) == N + 1, "each row once, and the first once more by itself"
    assert max(sizes) == min(chunk, N)
    np.testing.assert_array_equal(rows["x"]["half"], x / 2)
    np.testing.assert_array_equal(again["x"]["two"][1], x)
    np.testing.assert_array_equal(rows["y"], y + 1)
    np.testing.assert_allclose(rows["sample_weight"], weight, rtol=1e-6)


def test_preprocess_of_strings_by_a_keras_layer():
    words = np.array(["a b", "b", "c ä", "a c b"] * 13)[:N]
    layer = keras.layers.TextVectorization(output_sequence_length=4, vocabulary=["a", "b", "c"])
    expected = layer(tf.constant(words)).numpy()
    for strings in (words, words.astype(object), np.char.encode(words, "utf-8")):
        np.testing.assert_array_equal(everything(read(strings, preprocess=layer))["x"], expected)
    dataset = tf.data.Dataset.from_tensor_slices((words, np.arange(N)))
    rows = everything(read(dataset, preprocess=lambda x, y: (layer(x), y)))
    np.testing.assert_array_equal(rows["x"], expected)


def test_raw_rows_are_preprocessed_later_one_at_a_time():
    """By construction no row of a batch can hold another one."""
    words, sizes = np.array(["a b", "b", "c", "a c b"] * 13)[:N], []
    layer = keras.layers.TextVectorization(output_sequence_length=4, vocabulary=["a", "b", "c"])

    def preprocess(x, y):
        sizes.append(int(tf.shape(x)[0]))
        return layer(x), y

    weight = np.linspace(0.0, 1.0, N)
    raw = read(words, np.arange(N), weight, class_weight={1: 2.0})
    assert raw.raw_spec()["x"].dtype == tf.string
    for refused in (raw.spec, lambda: everything(raw), lambda: raw.digest(b"key")):
        with pytest.raises(TypeError, match="`x`.*of strings"):
            refused()
    later = raw.preprocessed_by(preprocess)
    assert set(sizes) == {1} and later.raw_spec() is None
    assert later.preprocessed_by(lambda x, y: 1 / 0) is later, "once is enough"
    given = read(words, np.arange(N), weight, class_weight={1: 2.0}, preprocess=preprocess)
    assert given.raw_spec() is None
    assert later.digest(b"key") == given.digest(b"key")


def test_preprocess_may_make_targets_and_weights():
    def shift(x):
        return x[:, :-1], x[:, 1:], tf.ones_like(x[:, 1:])

    rows = everything(read(arrays()[0], preprocess=shift))
    assert rows["y"].shape == rows["sample_weight"].shape == (N, 2)
    with pytest.raises(ValueError, match="sample_weight.*one place"):
        read(arrays()[0], sample_weight=np.ones(N), preprocess=shift)


@pytest.mark.parametrize(
    "preprocess, match",
    [
        (lambda x, y: (x[:3], y), "keep the number of rows"),
        (lambda x, y: (tf.reshape(x, [-1]), y), "keep the number of rows"),
        (lambda x, y: x, r"return \(x, y\)"),
        (lambda x, y: (x, y, y, y), "tuple of 4"),
        (lambda x, y: (x - tf.reduce_mean(x, axis=0), y), "each row by itself"),
        (lambda x, y: (tf.random.normal(tf.shape(x)), y), "each row by itself"),
        (lambda x, y: (x, tf.reverse(y, [0])), "each row by itself"),
        (lambda x, y: (tf.zeros([tf.shape(x)[0], tf.shape(x)[0]]), y), "each row by itself"),
    ],
)
def test_bad_preprocess(preprocess, match):
    x, y, _ = arrays()
    with pytest.raises(ValueError, match=match):
        read(x, y, preprocess=preprocess)


def test_preprocess_of_wrong_type_or_result():
    with pytest.raises(TypeError, match="`preprocess` to be a function"):
        read(preprocess="lower")
    with pytest.raises(TypeError, match="x of preprocess.*RaggedTensor"):
        read(preprocess=lambda x: tf.RaggedTensor.from_uniform_row_length(x, 1))
    with pytest.raises(TypeError, match="of strings"):
        read(preprocess=lambda x: tf.strings.as_string(x))


# ---- class weights


@pytest.mark.parametrize("shape", ["vector", "column", "float", "one_hot"])
def test_class_weight(shape):
    labels = np.arange(N) % 3
    y = {
        "vector": labels,
        "column": labels[:, None],
        "float": labels.astype(float),
        "one_hot": np.eye(3)[labels],
    }[shape]
    expected = np.choose(labels, [0.5, 1.0, 4.0]).astype("float32")
    rows = everything(read(y=y, class_weight={0: 0.5, 2: np.float64(4.0), 9: 7}))
    np.testing.assert_array_equal(rows["sample_weight"], expected)
    assert rows["sample_weight"].dtype == np.float32
    weight = np.linspace(0, 1, N).reshape(N, 1)
    rows = everything(read(y=y, sample_weight=weight, class_weight={0: 0.5, 2: 4}))
    np.testing.assert_allclose(rows["sample_weight"], weight * expected[:, None], rtol=1e-6)


def test_class_weight_agrees_with_keras():
    labels = np.random.default_rng(3).integers(0, 4, N)
    class_weight = {0: 0.25, 1: 2.0, 3: 5.0}
    seen = []

    class Probe(keras.Model):
        def train_step(self, data):
            seen.append(data[2])
            return {"loss": 0.0}

    model = Probe()
    model.compile(run_eagerly=True)
    model.fit(
        np.ones((N, 1)),
        labels,
        batch_size=N,
        class_weight=class_weight,
        shuffle=False,
        verbose=0,
        epochs=1,
    )
    rows = everything(read(y=labels, class_weight=class_weight))
    np.testing.assert_array_equal(rows["sample_weight"], np.ravel(seen[-1]))


@pytest.mark.parametrize(
    "y, class_weight, error, match",
    [
        (np.arange(N), [1, 2], TypeError, "dict"),
        (np.arange(N), {"0": 1.0}, TypeError, "key of class_weight"),
        (np.arange(N), {0: "1"}, TypeError, "number"),
        (np.arange(N), {0: -1.0}, ValueError, r"class_weight\[0\]=-1"),
        (np.arange(N), {0: float("nan")}, ValueError, "nan"),
        (np.arange(N), {-1: 1.0}, ValueError, "key of class_weight"),
        (None, {0: 1.0}, TypeError, "NoneType"),
        ({"a": np.arange(N)}, {0: 1.0}, TypeError, "single output"),
        (np.arange(N) + 0.5, {0: 1.0}, ValueError, "class numbers"),
        (np.ones((N, 3)), {0: 1.0}, ValueError, "one-hot"),
        (np.ones((N, 2, 2), int), {0: 1.0}, ValueError, "class numbers"),
    ],
)
def test_bad_class_weight(y, class_weight, error, match):
    with pytest.raises(error, match=match):
        read(y=y, class_weight=class_weight)


def test_class_weight_with_weights_of_several_outputs():
    with pytest.raises(TypeError, match="single output"):
        read(y=np.arange(N), sample_weight={"a": np.ones(N)}, class_weight={0: 1.0})


def test_the_digest_depends_on_rows_their_order_columns_and_key():
    """An example is its row number: the same rows in another order are another data set."""
    x, y = np.arange(2.0 * N).reshape(N, 2), np.arange(N) % 3
    key = b"k" * 16
    first = read(x, y).digest(key)
    assert first == read(x.copy(), y.copy()).digest(key) and len(first) == 32
    swapped = x.copy()
    swapped[[3, 7]] = swapped[[7, 3]]
    one_value = x.copy()
    one_value[-1, -1] += 1
    others = [
        read(swapped, y).digest(key),
        read(x[::-1].copy(), y[::-1].copy()).digest(key),
        read(one_value, y).digest(key),
        read(x.astype(np.int32), y).digest(key),
        read(x.reshape(N, 2, 1), y).digest(key),
        read(x).digest(key),
        read(x, sample_weight=y.astype(float)).digest(key),
        read(x, y).digest(b"l" * 16),
    ]
    assert len({first, *others}) == 1 + len(others)
