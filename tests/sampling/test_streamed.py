"""Batches streamed in a fixed order: those of the stream, in its order, or an error."""

import keras
import numpy as np
import pytest
import tensorflow as tf

import keras_bandmf as bandmf
from keras_bandmf.sampling import StreamedBatches
from keras_bandmf.sampling.schedule import Schedule
from tests import runs

N, BATCH, EPOCH, STEPS = 26, 4, 6, 15
KEY = np.array([5, 6], np.uint64)


def rows(count=N):
    """Features, a target, both different in each row."""
    x = np.arange(3 * count, dtype=np.float32).reshape(count, 3)
    return x, np.arange(count, dtype=np.float32)


def stream(count=N, batch=BATCH, drop=False):
    return tf.data.Dataset.from_tensor_slices(rows(count)).batch(batch, drop_remainder=drop)


def streamed(dataset=None, **changes):
    numbers = {"num_examples": N, "batch_size": BATCH, "num_steps": STEPS, "num_bands": 2}
    schedule = Schedule(**({"sampling": "fixed_order"} | numbers | changes))
    dataset = stream() if dataset is None else dataset
    return StreamedBatches(dataset, schedule=schedule, plan_fingerprint="f")


def changing(make):
    """A dataset that asks `make(number of the reading)` for its batches whenever it is read."""
    readings = []

    def batches():
        readings.append(None)
        yield from make(len(readings))

    specs = tf.TensorSpec((None, 3), tf.float32), tf.TensorSpec((None,), tf.float32)
    return tf.data.Dataset.from_generator(batches, output_signature=specs)


def parts(order):
    """Batches of the rows in an order."""
    x, y = rows()
    for start in range(0, len(order), BATCH):
        some = order[start : start + BATCH]
        yield x[some], y[some]


@pytest.mark.parametrize("replicas", [1, 3])
@pytest.mark.parametrize("cursor", [0, 4, 12])
def test_each_step_has_its_rows_from_any_position(replicas, cursor):
    batches = streamed()
    batches.bind(KEY)
    batches.cursor = cursor
    x, y = rows()
    found = list(batches.dataset(replicas).as_numpy_iterator())
    assert len(found) == STEPS - cursor
    for t, batch in enumerate(found, start=cursor):
        expected = np.arange(BATCH) + (t % EPOCH) * BATCH
        np.testing.assert_array_equal(batches.indices(t), expected)
        assert len(batch["mask"]) % replicas == 0 and batch["mask"].sum() == BATCH
        order = np.argsort(batch["y"][batch["mask"]], kind="stable")
        expected = expected[np.argsort(y[expected], kind="stable")]
        np.testing.assert_array_equal(batch["y"][batch["mask"]][order], y[expected])
        np.testing.assert_array_equal(
            np.sort(batch["x"][batch["mask"]], 0), np.sort(x[expected], 0)
        )
        # Copies of rows of the batch itself.
        assert {row.tobytes() for row in batch["x"]} <= {row.tobytes() for row in x[expected]}
        assert not batch["mask"].reshape(replicas, -1).all(axis=1).any()
        again = batches.batch(t, replicas)
        assert again.keys() == batch.keys()
        assert all(np.array_equal(again[name], batch[name]) for name in batch)


def test_shuffling_is_seen_before_training():
    with pytest.raises(ValueError, match="the same whenever.*shuffle=False"):
        streamed(stream().shuffle(3))
    with pytest.raises(ValueError, match="the same whenever"):
        x_y = tf.data.Dataset.from_tensor_slices(rows()).shuffle(5)
        streamed(x_y.batch(BATCH))


def test_a_stream_cut_short_or_of_another_count_is_refused():
    for dataset in (stream(drop=True), stream().take(3), stream(N - 1), stream(N - 4)):
        with pytest.raises(ValueError, match="num_examples=26 rows.*drop_final_batch=False"):
            streamed(dataset)
    for count in (N + 1, N + 4):
        with pytest.raises(ValueError, match="Received: more"):
            streamed(stream(count))


def test_other_batches_are_refused():
    with pytest.raises(ValueError, match="batch_size=4 rows.*Received: 5 rows"):
        streamed(stream(batch=5))
    with pytest.raises(ValueError, match="Received: 3 rows after 3"):
        streamed(stream(batch=3))
    with pytest.raises(ValueError, match="infinite"):
        streamed(stream().repeat())
    with pytest.raises(TypeError, match="tf.data.Dataset"):
        streamed(rows())
    with pytest.raises(TypeError, match="RaggedTensorSpec"):
        streamed(tf.data.Dataset.from_tensor_slices(tf.ragged.constant([[1.0], [2.0, 3.0]])))
    with pytest.raises(TypeError, match="strings"):
        streamed(tf.data.Dataset.from_tensor_slices(["a"] * N).batch(BATCH))


@pytest.mark.parametrize("late", ["other rows", "cut short"])
def test_a_stream_that_changes_later_ends_training_before_the_step(late):
    """The check before training reads a few batches; every later one is compared too."""

    def make(reading):
        order = np.arange(N)
        if reading > 2 and late == "other rows":
            order[[20, 21]] = order[[21, 20]]
        yield from parts(order[:20] if reading > 2 and late == "cut short" else order)

    batches = streamed(changing(make))
    batches.bind(KEY)
    found = iter(batches.dataset())
    for _ in range(5):
        next(found)
    with pytest.raises(tf.errors.InvalidArgumentError, match="in step 5"):
        next(found)


def test_digest_depends_on_key_rows_and_order():
    def digest(dataset, key=KEY):
        batches = streamed(dataset)
        batches.bind(key)
        return batches.digest()

    first = digest(stream())
    assert first == digest(stream()) and len(first) == 32
    assert first != digest(stream(), key=KEY + np.uint64(1))
    x, y = rows()
    other = tf.data.Dataset.from_tensor_slices((x[::-1], y)).batch(BATCH)
    assert first != digest(other)
    with pytest.raises(RuntimeError, match="no sampler key"):
        streamed().digest()


@pytest.mark.parametrize("replicas", [1, 2])
def test_participations_in_a_fit_that_goes_on_within_an_epoch(replicas):
    """Row i moves weight i alone: what is not the remainder takes part once an epoch."""
    n, batch = 96, 8
    plan = runs.make_plan(
        num_examples=n + 3, noise_multiplier=5e-7, sampling="fixed_order", num_steps=24
    )
    x = np.eye(n + 3, dtype=np.float32)
    data = tf.data.Dataset.from_tensor_slices((x, np.zeros(n + 3, np.float32))).batch(batch)
    batches = bandmf.tfx_input.streamed_batches(data, plan)
    model = runs.compiled_in_scope(replicas, lambda: runs.counting_model(n + 3), plan, seed=None)
    updates = np.concatenate(
        [
            runs.fit(model, batches, epochs=1, steps_per_epoch=5),
            runs.fit(model, batches, epochs=1, steps_per_epoch=12),
        ]
    )
    took_part = updates * batch > 0.5
    assert updates.shape == (17, n + 3)
    for t, row in enumerate(took_part):
        np.testing.assert_array_equal(np.flatnonzero(row), batches.indices(t))
    text = " ".join(str(bandmf.statement(model)).split())
    assert "at most 2 times, at least 12 steps apart" in text and "declared" not in text


def test_a_resumed_run_refuses_another_stream(tmp_path):
    """An example is its place in the stream: others would sit closer than accounted for."""

    def model_and_batches(data):
        plan = runs.make_plan(sampling="fixed_order")
        model = runs.compiled(runs.noise_model(units=4), plan, seed=None)
        data = tf.data.Dataset.from_tensor_slices(data).batch(8)
        return model, bandmf.tfx_input.streamed_batches(data, plan)

    x, y = runs.noise_data()
    model, batches = model_and_batches((x, y))
    model.fit(batches, epochs=1, steps_per_epoch=5, verbose=0)
    with pytest.warns(UserWarning, match="secrets"):
        model.save_weights(tmp_path / "run.weights.h5")
    for other in (False, True):
        again, batches = model_and_batches((x + 1.0 if other else x, y))
        again.optimizer.build(again.trainable_variables)
        again.load_weights(tmp_path / "run.weights.h5")
        if other:
            with pytest.raises(ValueError, match="data"):
                again.fit(batches, epochs=1, verbose=0)
        else:
            again.fit(batches, epochs=1, verbose=0)
            assert again.optimizer.steps_done == 17
    keras.backend.clear_session()
