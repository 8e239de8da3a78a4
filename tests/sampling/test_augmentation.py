"""Random views: made row by row from seeds of their own, the same wherever and whenever."""

import pickle

import keras
import numpy as np
import pytest
import tensorflow as tf

from keras_bandmf import PrivacyError
from keras_bandmf.sampling.augmentation import Augmentation
from tests.sampling.test_batches import N, batches_of, same

SPEC = {"x": tf.TensorSpec((None, 6, 6, 1), tf.float32), "y": tf.TensorSpec((None,), tf.int64)}


def shifted(x, seed):
    """A crop at a random place."""
    padded = tf.pad(x, [[1, 1], [1, 1], [0, 0]])
    return tf.image.stateless_random_crop(padded, (6, 6, 1), seed)


def plus_noise(x, seed):
    """The row number plus uniform noise in (0, 1)."""
    return tf.cast(x, tf.float32) + tf.random.stateless_uniform([], seed)


def batch_of(rows=5, copies=2):
    rng = np.random.default_rng(0)
    return {
        "x": tf.constant(rng.normal(size=(rows, 6, 6, 1)), tf.float32),
        "y": tf.range(rows, dtype=tf.int64),
        "seeds": tf.constant(rng.integers(0, 2**62, (rows, copies, 2))),
    }


@pytest.mark.parametrize(
    "function",
    [shifted, keras.Sequential([keras.layers.RandomTranslation(0.2, 0.2, seed=1)])],
)
def test_views_depend_on_their_row_and_seed_alone(function):
    augment, batch = Augmentation(function, 2, SPEC), batch_of()
    views = augment(batch)
    assert views["x"].shape == (10, 6, 6, 1) and "seeds" not in views
    np.testing.assert_array_equal(views["y"], np.repeat(np.arange(5), 2))
    same(views, augment(batch))
    assert np.any(views["x"][::2] != views["x"][1::2])
    alone = augment({name: part[3:4] for name, part in batch.items()})
    np.testing.assert_array_equal(alone["x"], views["x"][6:8])
    others = batch | {"x": tf.concat([100 * batch["x"][:3], batch["x"][3:]], 0)}
    np.testing.assert_array_equal(augment(others)["x"][6:], views["x"][6:])


def test_targets_are_changed_where_the_function_asks_for_them():
    def both(x, y, seed):
        flip = tf.random.stateless_uniform([], seed) < 0.5
        return tf.where(flip, -x, x), tf.where(flip, -y, y)

    views = Augmentation(both, 2, SPEC)(batch_of())
    x = batch_of()["x"].numpy()
    flips = np.all(views["x"].numpy().reshape(5, 2, -1) == -x.reshape(5, 1, -1), axis=2)
    assert 0 < flips.sum() < 10
    expected = np.where(flips, -1, 1) * np.arange(5)[:, None]
    np.testing.assert_array_equal(views["y"].numpy().reshape(5, 2), expected)


def own_noise(x, seed):
    """Noise that does not come from the seed."""
    return x + tf.random.normal([])


def python(x, seed):
    """Calls Python while it runs."""
    return tf.ensure_shape(tf.numpy_function(lambda v: v, [x], tf.float32), x.shape)


def in_a_branch(x, seed):
    """Hides its noise in a branch."""
    return tf.cond(x[0, 0, 0] > 0, lambda: x + tf.random.uniform([]), lambda: x)


def counted():
    """Keeps a count of rows."""
    count = tf.Variable(0.0)

    def function(x, seed):
        return x + count.assign_add(1.0)

    return function


def stateless_python(x, seed):
    """Calls Python, and says that it does not matter."""
    y = tf.numpy_function(lambda v: v, [x], tf.float32, stateful=False)
    return tf.ensure_shape(y, x.shape)


@tf.nondifferentiable_batch_function(2, 2, 1000, autograph=False)
def of_several_calls(x):
    """Sums what several calls bring."""
    return x + tf.reduce_sum(x)


def several_calls(x, seed):
    """Looks across rows."""
    return tf.ensure_shape(of_several_calls(x[None])[0], x.shape)


def from_a_file(x, seed):
    """Reads a file in each step."""
    return x + tf.cast(tf.strings.length(tf.io.read_file("/dev/null")), x.dtype)


def from_a_variable():
    """Reads a variable that something may change."""
    strength = tf.Variable(1.0)
    return lambda x, seed: x * strength


def from_a_table():
    """Reads a table that something may change."""
    table = tf.lookup.experimental.MutableHashTable(tf.int64, tf.float32, 0.0)
    return lambda x, seed: x + table.lookup(tf.constant([1], tf.int64))


def from_the_data():
    """Reads other rows from a data set."""
    rows = tf.data.Dataset.from_tensor_slices(np.ones((3, 6, 6, 1), np.float32))
    return lambda x, seed: x + rows.batch(3).get_single_element()[0]


@pytest.mark.parametrize(
    "function",
    [
        stateless_python,
        several_calls,
        from_a_file,
        from_a_variable(),
        from_a_table(),
        from_the_data(),
        keras.Sequential([keras.layers.Rescaling(2.0), keras.layers.BatchNormalization()]),
    ],
)
def test_refuses_what_reads_more_than_a_row(function):
    with pytest.raises(PrivacyError, match="from its row and its seed alone"):
        Augmentation(function, 1, SPEC)


@pytest.mark.parametrize(
    "function",
    [own_noise, python, in_a_branch, counted(), lambda x, seed: tf.image.random_flip_up_down(x)],
)
def test_refuses_what_does_not_come_from_the_row_and_its_seed(function):
    with pytest.raises(PrivacyError, match="from its row and its seed alone"):
        Augmentation(function, 1, SPEC)


@pytest.mark.parametrize(
    ("function", "copies", "error", "message"),
    [
        (3, 1, TypeError, "augment=3"),
        (shifted, 0, ValueError, "augment_copies"),
        (shifted, 1.5, TypeError, "augment_copies"),
        (lambda x, seed: tf.boolean_mask(x, x > 0), 1, ValueError, "one shape"),
        (lambda x, y, seed: (x, tf.one_hot(y, 3)), 1, ValueError, "shape and dtype of the targets"),
        (lambda x, y, seed: (x, tf.cast(y, tf.int32)), 1, ValueError, "dtype of the targets"),
        (lambda x, y, seed: x, 1, ValueError, r"return \(x, y\)"),
        (lambda x, seed: None, 1, ValueError, "dense"),
    ],
)
def test_refuses_other_arguments(function, copies, error, message):
    with pytest.raises(error, match=message):
        Augmentation(function, copies, SPEC)


def test_refuses_targets_that_are_not_there():
    with pytest.raises(ValueError, match="parameter `y`"):
        Augmentation(lambda x, y, seed: (x, y), 1, {"x": SPEC["x"]})
    with pytest.raises(ValueError, match="`augment` together with `augment_copies`"):
        batches_of(augment_copies=2)


def number_and_noise(batch, copies):
    """Row numbers and noise of the drawn rows, each (examples, copies), in order of the rows."""
    values = np.asarray(batch["x"], np.float64)[np.asarray(batch["mask"])].reshape(-1, copies)
    values = values[np.argsort(values[:, 0])]
    return np.floor(values).astype(int), values - np.floor(values)


def test_batches_draw_fresh_views_alike_on_any_number_of_replicas():
    made = batches_of(augment=plus_noise, augment_copies=3)
    assert made.rows_per_example == 3
    rows, noise = number_and_noise(made.batch(5), 3)
    np.testing.assert_array_equal(rows[:, 0], np.sort(made.indices(5)))
    assert (rows == rows[:, :1]).all()
    assert len(np.unique(noise)) == noise.size
    two_rows, two_noise = number_and_noise(made.batch(5, 2), 3)
    np.testing.assert_array_equal(rows, two_rows)
    np.testing.assert_array_equal(noise, two_noise)
    later = number_and_noise(batches_of(augment=plus_noise, augment_copies=3).batch(8), 3)[1]
    assert not np.isin(later, noise).any()


def test_the_data_set_continues_with_the_same_views():
    made = batches_of(augment=plus_noise, augment_copies=2)
    spec = made.element_spec()
    assert spec["x"] == tf.TensorSpec((None,), tf.float32) and "seeds" not in spec
    whole = list(made.dataset())
    assert len(whole) == 24
    for t, batch in enumerate(whole):
        same(batch, made.batch(t))
    again = batches_of(augment=plus_noise, augment_copies=2)
    again.cursor = 11
    same(next(iter(again.dataset())), whole[11])


def test_units_of_several_rows_have_views_of_each():
    ids = np.repeat(np.arange(N), 2)
    made = batches_of(
        np.arange(2 * N, dtype="int32"),
        y=None,
        unit=ids,
        rows_per_unit=2,
        augment=plus_noise,
        augment_copies=2,
    )
    assert made.rows_per_example == 4
    batch = made.batch(2)
    rows = np.floor(batch["x"]).astype(int).reshape(-1, 2, 2)
    assert (rows[..., 0] == rows[..., 1]).all()
    drawn = batch["mask"].reshape(-1, 4).all(axis=1)
    assert sorted(ids[rows[drawn, 0, 0]]) == sorted(made.indices(2))
    assert (rows[drawn, 0, 0] != rows[drawn, 1, 0]).all()


def own_seed(x, seed):
    """Draws from a seed of its own."""
    return tf.cast(x, tf.float32) + tf.random.stateless_uniform([], [1, 2])


def test_warns_of_views_that_are_always_the_same(recwarn):
    with pytest.warns(UserWarning, match="same views"):
        batches_of(augment=own_seed)
    recwarn.clear()
    batches_of(augment=plus_noise)
    assert not [w for w in recwarn if "same views" in str(w.message)]


def test_batches_with_a_function_can_be_copied():
    made = batches_of(augment=plus_noise, augment_copies=2, key=None)
    again = pickle.loads(pickle.dumps(made))
    for each in (made, again):
        each.bind(np.array([11, 12], np.uint64))
    same(made.batch(4), again.batch(4))


def test_the_first_rows_are_as_many_as_a_batch_and_all_different():
    first = batches_of(augment=plus_noise, augment_copies=3).first_rows()["x"]
    assert np.floor(first).tolist() == list(range(30))
    assert len(np.unique(first - np.floor(first))) == 30


def test_the_first_rows_look_like_those_of_training():
    made = batches_of(augment=lambda x, seed: tf.one_hot(x, 3), augment_copies=2)
    assert made.first_rows()["x"].shape == (20, 3)
    assert batches_of().first_rows()["x"].shape == (10,)
