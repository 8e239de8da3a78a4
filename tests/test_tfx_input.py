"""What a TFX Trainer is given: the plan in `custom_config`, and streams as TFXIO makes them."""

import json
import subprocess
import sys

import keras
import numpy as np
import pytest
import tensorflow as tf

import keras_bandmf as bandmf
from keras_bandmf import tfx_input
from keras_bandmf.sampling import StreamedBatches
from tests import runs


def stream(count=96, batch=8, **options):
    """As TFXIO: batches of a dict of features and a label, each of shape (batch, 1)."""
    x = np.arange(count, dtype=np.float32)[:, None]
    data = tf.data.Dataset.from_tensor_slices(({"a": x, "b": -x}, x.astype(np.int64)))
    return data.batch(batch, **options)


def fixed_plan(**changes):
    return runs.make_plan(sampling="fixed_order", **changes)


@pytest.mark.parametrize("plan", [runs.make_plan(), fixed_plan(num_bands=1)], ids=["p", "f"])
def test_the_plan_survives_custom_config(plan):
    """TFX stores `custom_config` as JSON."""
    config = json.loads(json.dumps({**tfx_input.plan_to_config(plan), "other": 1}))
    back = tfx_input.plan_from_config(config)
    assert back == plan and back.fingerprint == plan.fingerprint
    assert back.strategy == plan.strategy


def changed(**fields):
    document = json.loads(runs.make_plan().to_json()) | fields
    return {tfx_input.PLAN_KEY: json.dumps(document)}


@pytest.mark.parametrize(
    "config, message",
    [
        ({}, "Expected a plan.*plan_to_config"),
        ({"plan": "x"}, r"keys \['plan'\]"),
        (changed(version=4), "version=4.*same release"),
        (changed(format="another"), "TrainingPlan"),
        (changed(unknown=1), "unknown.*'unknown'"),
        (changed(noise_multiplier=-1.0), "noise_multiplier"),
        ({tfx_input.PLAN_KEY: {"version": 1}}, "string of JSON"),
        ({tfx_input.PLAN_KEY: "{"}, "same release"),
    ],
)
def test_a_config_that_holds_no_plan_of_this_version(config, message):
    with pytest.raises(ValueError, match=message):
        tfx_input.plan_from_config(config)


@pytest.mark.parametrize("config", [None, "plan", [1]])
def test_a_config_that_is_no_dict(config):
    with pytest.raises(TypeError, match="custom_config.*plan_to_config"):
        tfx_input.plan_from_config(config)


def test_stream_options_turn_off_what_is_not_accounted_for():
    options = tfx_input.stream_options(runs.make_plan(), "label")
    assert options["batch_size"] == 8 and options["label_key"] == "label"
    assert options["num_epochs"] == options["reader_num_threads"] == 1
    assert not options["shuffle"] and not options["drop_final_batch"]
    assert not options["sloppy_ordering"]


def test_private_batches_hold_the_rows_of_the_stream():
    plan = runs.make_plan()
    batches = tfx_input.private_batches(stream(batch=7), plan, seed=0)
    found = batches.rows(np.arange(96))
    np.testing.assert_array_equal(found["x"]["a"][:, 0], np.arange(96))
    np.testing.assert_array_equal(found["x"]["b"], -found["x"]["a"])
    np.testing.assert_array_equal(found["y"], found["x"]["a"])
    direct = plan.batches(found["x"], found["y"], seed=0)
    for t in range(plan.num_steps):
        np.testing.assert_array_equal(batches.indices(t), direct.indices(t))
    assert batches.plan_fingerprint == plan.fingerprint


def test_features_become_one_array_by_preprocess():
    batches = tfx_input.private_batches(
        stream(),
        runs.make_plan(),
        preprocess=lambda x, y: (tf.concat([x["a"], x["b"]], axis=1), y[:, 0]),
        class_weight={i: 2.0 for i in range(96)},
    )
    found = batches.rows(np.arange(3))
    np.testing.assert_array_equal(found["x"], [[0, 0], [1, -1], [2, -2]])
    np.testing.assert_array_equal(found["sample_weight"], [2, 2, 2])


@pytest.mark.parametrize("count", [95, 97])
@pytest.mark.parametrize(
    "make, plan",
    [(tfx_input.private_batches, runs.make_plan), (tfx_input.streamed_batches, fixed_plan)],
)
def test_another_count_than_num_examples_is_refused(make, plan, count):
    with pytest.raises(ValueError, match="num_examples=96"):
        make(stream(count), plan())


@pytest.mark.parametrize(
    "make, plan",
    [(tfx_input.private_batches, runs.make_plan), (tfx_input.streamed_batches, fixed_plan)],
)
def test_what_is_no_single_pass_is_refused(make, plan):
    with pytest.raises(ValueError, match="stream_options"):
        make(stream().repeat(), plan())
    with pytest.raises(ValueError, match="num_examples=96"):
        make(stream().repeat(2), plan())
    with pytest.raises(ValueError, match="num_examples=96"):
        make(stream(99, drop_remainder=True).skip(1), plan())
    with pytest.raises(TypeError, match="tf_dataset_factory"):
        make(list(stream()), plan())


def test_streams_in_a_fixed_order():
    batches = tfx_input.streamed_batches(stream(), fixed_plan())
    assert isinstance(batches, StreamedBatches) and batches.sampling == "fixed_order"
    with pytest.raises(ValueError, match="shuffle=False"):
        tfx_input.streamed_batches(stream().shuffle(4), fixed_plan())
    with pytest.raises(ValueError, match="private_batches"):
        tfx_input.streamed_batches(stream(), runs.make_plan())
    with pytest.raises(ValueError, match="max_participations=2"):
        tfx_input.streamed_batches(stream(), fixed_plan(max_participations=2, min_separation=12))


def test_training_on_both_kinds_of_batches():
    """Dicts of features, as they come out of TFXIO."""
    for make, plan in (
        (tfx_input.private_batches, runs.make_plan()),
        (tfx_input.streamed_batches, fixed_plan()),
    ):
        inputs = {name: keras.Input((1,), name=name) for name in ("a", "b")}
        joined = keras.layers.Concatenate()([inputs["a"], inputs["b"]])
        model = bandmf.privatize(keras.Model(inputs, keras.layers.Dense(1)(joined)))
        runs.compiled(model, plan, seed=None, loss="mse", inner="sgd")
        model.fit(make(stream(), plan), epochs=2, verbose=0)
        assert bandmf.statement(model).private and model.optimizer.steps_done == 24


LEGACY = """
import os
os.environ["TF_USE_LEGACY_KERAS"] = "1"
import tensorflow as tf
import keras_bandmf as bandmf
from tests import runs
layers = tf.keras.layers
model = tf.keras.Sequential([layers.InputLayer((2,)), layers.Dense(1)])
for refused in (
    lambda: bandmf.privatize(model),
    lambda: bandmf.export(model, "nowhere"),
    lambda: bandmf.clipped_gradients(model, [[0.0, 0.0]], [0.0], l2_norm_clip=1.0),
    lambda: bandmf.BandMFOptimizer(tf.keras.optimizers.SGD(), runs.make_plan()),
    lambda: bandmf.TrainingPlan(num_examples=9, batch_size=1, num_steps=9, num_bands=2,
        noise_multiplier=1.0, delta=1e-5, workload=tf.keras.optimizers.SGD()),
):
    try:
        refused()
    except (TypeError, ValueError) as error:
        print("REFUSED", str(error).replace(chr(10), " "))
    else:
        print("ACCEPTED")
"""


def test_keras_2_is_refused_and_the_way_out_named():
    """As after `import tensorflow_transform`, in a process of its own."""
    pytest.importorskip("tf_keras")
    found = subprocess.run([sys.executable, "-c", LEGACY], capture_output=True, text=True)
    lines = [line for line in found.stdout.splitlines() if line.startswith(("REFUSED", "ACC"))]
    assert len(lines) == 5, found.stderr
    for line in lines:
        assert line.startswith("REFUSED") and "import keras" in line and "Keras 2" in line, line


def test_the_library_does_not_import_tfx():
    code = "import sys, keras_bandmf; print({name.split('.')[0] for name in sys.modules})"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "keras_bandmf" in found.stdout, found.stderr
    for package in ("tfx", "tfx_bsl", "tensorflow_transform", "tf_keras", "apache_beam"):
        assert f"'{package}'" not in found.stdout


def stream_of_users(shape=()):
    """Rows 0 to 191 of 96 users, whose ids are a feature."""
    ids = np.repeat(np.arange(96), 2)[::-1].reshape(192, *shape)
    x = {"a": np.arange(192.0, dtype=np.float32)[:, None], "user": ids.copy()}
    return tf.data.Dataset.from_tensor_slices((x, np.zeros(192))).batch(40)


@pytest.mark.parametrize("shape", [(), (1,)])
def test_users_are_named_by_a_feature(shape):
    plan = runs.make_plan(unit="user")
    batches = tfx_input.private_batches(
        stream_of_users(shape), plan, unit_key="user", rows_per_unit=2, seed=0
    )
    assert set(batches.rows(np.arange(2))["x"]) == {"a"}
    batch = batches.batch(3)
    rows = batch["x"]["a"][batch["mask"]].astype(int).reshape(-1, 2)
    whose = np.repeat(np.arange(96), 2)[::-1][rows]
    assert (whose[:, 0] == whose[:, 1]).all()
    assert sorted(whose[:, 0]) == sorted(batches.indices(3))


def test_users_without_a_feature_are_refused():
    with pytest.raises(ValueError, match="unit_key"):
        tfx_input.private_batches(stream_of_users(), runs.make_plan(unit="user"))
    with pytest.raises(ValueError, match="unit_key='who'"):
        tfx_input.private_batches(stream_of_users(), runs.make_plan(unit="user"), unit_key="who")
    with pytest.raises(ValueError, match="counts rows"):
        tfx_input.private_batches(stream(), runs.make_plan(), unit_key="a")


def test_streams_can_be_augmented():
    batches = tfx_input.private_batches(
        stream(),
        runs.make_plan(),
        augment=lambda x, seed: {"a": x["a"] + tf.random.stateless_uniform([1], seed)},
        augment_copies=2,
        seed=0,
    )
    assert batches.rows_per_example == 2
    assert set(batches.batch(0)["x"]) == {"a"}
