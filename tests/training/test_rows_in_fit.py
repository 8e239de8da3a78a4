"""`fit` on rows, as in Keras: the same run as on `plan.batches`, or an error with both numbers."""

import dataclasses

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras.src.trainers.data_adapters.array_slicing import train_validation_split

import keras_bandmf as bandmf
from keras_bandmf.training import own_batches
from tests import runs

X, Y = runs.counting_data()
PLAN = runs.make_plan()


def counted(updates):
    """Which rows took part in each step; the noise is small."""
    return np.round(updates * 8).astype(int)


def quiet_plan(**changes):
    """A plan whose noise does not hide who took part."""
    return runs.make_plan(noise_multiplier=1e-3, **changes)


def model_of(plan=PLAN, replicas=1, **options):
    """A counting model of a seeded run."""
    return runs.compiled_in_scope(replicas, runs.counting_model, plan, **options)


def without_id(model):
    """The statement of a model but for the random name of the run."""
    return dataclasses.replace(bandmf.statement(model), run_id=None)


@pytest.mark.parametrize("sampling", ["cyclic_poisson", "random_allocation", "fixed_order"])
def test_rows_are_the_batches_of_the_plan_under_every_law(sampling):
    """Same rows, same noise, same epsilon, same statement."""
    rounds = {"max_participations": 2} if sampling == "random_allocation" else {}
    plan = runs.make_plan(sampling=sampling, **rounds)
    ours, theirs = model_of(plan, run_eagerly=True), model_of(plan, run_eagerly=True)
    short = {"epochs": 1, "steps_per_epoch": 5}
    np.testing.assert_array_equal(
        runs.fit(ours, X, y=Y, batch_size=8, shuffle=True, **short),
        runs.fit(theirs, plan.batches(X, Y), **short),
    )
    assert without_id(ours) == without_id(theirs)
    assert bandmf.statement(ours).epsilon == plan.epsilon(steps=5)


@pytest.mark.parametrize(
    ("replicas", "options"), [(1, {}), (1, {"jit_compile": True}), (2, {})], ids=str
)
def test_rows_are_the_batches_of_the_plan_however_they_run(replicas, options):
    weights = np.linspace(0.5, 1.5, 96, dtype=np.float32)
    ours, theirs = (model_of(quiet_plan(), replicas, **options) for _ in range(2))
    updates = runs.fit(ours, X, y=Y, sample_weight=weights, class_weight={0: 0.5})
    batches = quiet_plan().batches(X, Y, weights, class_weight={0: 0.5})
    np.testing.assert_array_equal(updates, runs.fit(theirs, batches))
    assert without_id(ours) == without_id(theirs)
    assert updates.any()


@pytest.mark.parametrize("options", [{}, {"jit_compile": True}], ids=str)
def test_calls_of_both_kinds_continue_one_run(options):
    """The sampler's key is bound once, and the rows are found again."""
    plan = quiet_plan(num_steps=48)
    whole = runs.fit(model_of(plan, **options), plan.batches(X, Y), epochs=4)
    model, kinds = (
        model_of(plan, **options),
        [
            {"batches": X, "y": Y},
            {"batches": plan.batches(X, Y)},
            {"batches": tf.data.Dataset.from_tensor_slices((X, Y))},
            {"batches": X.copy(), "y": Y, "validation_data": (X[:3], Y[:3])},
        ],
    )
    parts = [runs.fit(model, epochs=1, **kind) for kind in kinds]
    np.testing.assert_array_equal(counted(np.concatenate(parts)), counted(whole))
    assert len(whole) == 48 and counted(whole).any()
    with pytest.raises(ValueError, match="48 steps and all of them are spent"):
        model.fit(X, Y, verbose=0)


@pytest.mark.parametrize("first", ["rows", "batches"])
@pytest.mark.parametrize("other", ["order", "target", "weight"])
def test_other_rows_are_refused_in_a_later_fit(first, other):
    """Rule 11: an example is its row number."""
    model = model_of(run_eagerly=True)
    data = (X, Y) if first == "rows" else (PLAN.batches(X, Y),)
    model.fit(*data, epochs=1, steps_per_epoch=2, verbose=0)
    changed = {
        "order": {"x": X[::-1], "y": Y},
        "target": {"x": X, "y": Y + 1},
        "weight": {"x": X, "y": Y, "sample_weight": np.ones(96)},
    }[other]
    with pytest.raises(bandmf.PrivacyError, match="differ from those the run began with"):
        model.fit(**changed, epochs=1, verbose=0)
    assert model.optimizer.steps_done == 2


def test_a_dataset_that_is_shuffled_anew_is_refused_in_a_later_fit():
    model = model_of(run_eagerly=True)
    data = tf.data.Dataset.from_tensor_slices((X, Y)).shuffle(96)
    model.fit(data, epochs=1, steps_per_epoch=2, verbose=0)
    with pytest.raises(bandmf.PrivacyError, match="no `shuffle`"):
        model.fit(data, epochs=1, verbose=0)


def test_rows_that_are_split_off_never_take_part():
    plan = quiet_plan(num_examples=72, num_steps=18)
    model = model_of(plan)
    updates = runs.fit(model, X, y=Y, validation_split=0.25, batch_size=8)
    expected = runs.fit(model_of(plan), plan.batches(X[:72], Y[:72]))
    np.testing.assert_array_equal(updates, expected)
    assert counted(updates)[:, :72].any() and not counted(updates)[:, 72:].any()
    (caveat,) = [c for c in bandmf.statement(model).caveats if "validation_split" in c]
    assert "last 24 of 96 rows" in caveat and "first 72" in caveat


def test_split_off_rows_are_validated_on_with_their_weights():
    plan = runs.make_plan(num_examples=72, num_steps=9)
    weights = np.arange(96, dtype=np.float32)
    targets = np.arange(96, dtype=np.float32)
    model = model_of(plan, loss="mse", run_eagerly=True)
    callback = keras.callbacks.EarlyStopping(monitor="val_loss", patience=5)
    history = model.fit(
        X, targets, sample_weight=weights, validation_split=0.25, verbose=0, callbacks=[callback]
    ).history
    expected = model.evaluate(X[72:], targets[72:], sample_weight=weights[72:], verbose=0)
    np.testing.assert_allclose(history["val_loss"][-1], expected, rtol=1e-6)


@pytest.mark.parametrize("total", [10, 96, 97, 1001])
@pytest.mark.parametrize("share", [0.1, 0.2, 0.29, 1 / 3, 0.58, 0.8])
def test_the_split_is_that_of_keras(total, share):
    x = {"a": np.arange(total), "b": [tf.range(total), np.arange(total)]}
    asked = dict.fromkeys(field.name for field in dataclasses.fields(own_batches.Asked))
    asked = own_batches.Asked(**(asked | {"x": x, "validation_split": share}))
    count, rows, validation, _ = own_batches._split(asked, total)
    numbers = np.arange(total)
    train, held_out = train_validation_split(numbers, share)
    assert count == len(train)
    for leaf, other in zip(
        keras.tree.flatten(rows[0]), keras.tree.flatten(validation), strict=True
    ):
        np.testing.assert_array_equal(np.asarray(leaf), train)
        np.testing.assert_array_equal(np.asarray(other), held_out)


def test_validation_data_overrides_the_split_as_in_keras():
    model = model_of(run_eagerly=True)
    given = {"validation_split": 0.25, "validation_data": (X[:4], Y[:4])}
    model.fit(X, Y, epochs=1, steps_per_epoch=2, verbose=0, **given)
    assert not any("validation_split" in caveat for caveat in bandmf.statement(model).caveats)


NUMBERS = {
    "rows": ({"x": X[:90], "y": Y[:90]}, "num_examples=96.*90 rows"),
    "split": ({"validation_split": 0.25}, "num_examples=96.*96 rows.*0.25 leaves 72"),
    "dataset": ({"x": tf.data.Dataset.range(40), "y": None}, "num_examples=96.*40 rows"),
    "batch_size": ({"batch_size": 16}, "plan's 8.*batch_size=16"),
    "epochs": ({"epochs": 3}, "24 steps that are left.*2 epochs.*3 epochs, 36 steps.*epochs=2"),
    "later epochs": ({"epochs": 9, "initial_epoch": 5}, "4 epochs, 48 steps.*epochs=7"),
    "short epochs": ({"epochs": 6, "steps_per_epoch": 5}, "5 epochs of 5.*6 epochs, 30 steps"),
    "steps": ({"steps_per_epoch": 13}, "plan's 12.*steps_per_epoch=13"),
}


@pytest.mark.parametrize("name", NUMBERS)
def test_numbers_that_do_not_agree_with_the_plan_are_named(name):
    arguments, names = NUMBERS[name]
    model = model_of(run_eagerly=True)
    with pytest.raises(ValueError, match=f"(?s){names}"):
        model.fit(**({"x": X, "y": Y, "verbose": 0} | arguments))
    assert model.optimizer.steps_done == 0


def test_rows_do_not_say_whose_they_are():
    """A plan of users needs ids, which only `plan.batches` takes."""
    model = model_of(runs.make_plan(unit="user"))
    with pytest.raises(ValueError, match="'user'.*unit=ids"):
        model.fit(X, Y, verbose=0)


def test_fewer_epochs_are_trained_with_a_warning(caplog):
    model = model_of(run_eagerly=True)
    model.fit(X, Y, epochs=1, steps_per_epoch=2, verbose=0)
    assert model.optimizer.steps_done == 2
    assert "leaves 22 steps" in caplog.text


class Rows(keras.utils.PyDataset):
    """Batches of eight."""

    def __len__(self):
        return 12

    def __getitem__(self, index):
        """Returns one batch."""
        return X[8 * index : 8 * index + 8], Y[8 * index : 8 * index + 8]


DATA = tf.data.Dataset.from_tensor_slices((X, Y))
BAD = {
    "generator": ({"x": iter([(X, Y)]), "y": None}, "plan.batches"),
    "pydataset": ({"x": Rows(), "y": None}, "plan.batches"),
    "nothing": ({"x": None, "y": None}, "plan.batches"),
    "numbers": ({"x": [1.0] * 96}, "plan.batches"),
    "scalar": ({"x": np.float32(1)}, "plan.batches"),
    "empty dict": ({"x": {}}, "`x`"),
    "no rows": ({"x": X[:0], "y": Y[:0]}, "0 rows"),
    "fewer targets": ({"y": Y[:95]}, "`y`.*x of 96 rows, y of 95"),
    "fewer weights": ({"sample_weight": np.ones(90)}, "`sample_weight`.*96 rows.*of 90"),
    "unequal inputs": ({"x": [X, X[:5]]}, "`x`.*96, 5 rows"),
    "NaN weights": ({"sample_weight": np.full(96, np.nan)}, "sample_weight"),
    "negative weights": ({"sample_weight": -np.ones(96)}, "sample_weight"),
    "class weights": ({"class_weight": {0: -1.0}}, "class_weight"),
    "sparse": ({"x": tf.sparse.from_dense(X)}, "dense"),
    "ragged": ({"x": tf.RaggedTensor.from_tensor(X)}, "dense"),
    "strings": ({"x": np.full((96, 96), "a")}, "strings|numbers"),
    "not shuffled": ({"shuffle": False}, "shuffle=False"),
    "shuffle": ({"shuffle": "batch"}, "shuffle"),
    "split": ({"validation_split": 1.0}, "validation_split"),
    "negative split": ({"validation_split": -0.5}, "validation_split"),
    "NaN split": ({"validation_split": float("nan")}, "validation_split"),
    "split of text": ({"validation_split": "a"}, "validation_split"),
    "nothing left": ({"validation_split": 0.999}, "rows for training and for validation"),
    "nothing to split": ({"x": X[:9], "y": Y[:9], "validation_split": 1e-17}, "for validation"),
    "split dataset": ({"x": DATA, "y": None, "validation_split": 0.5}, "`take` and `skip`"),
    "dataset and y": ({"x": DATA}, "`y`"),
    "batches": ({"x": DATA.batch(8), "y": None}, "unbatch"),
    "whole batches": ({"x": DATA.batch(8, True), "y": None}, "unbatch"),
    "endless": ({"x": DATA.repeat(), "y": None}, "infinite"),
    "unknown": ({"x": DATA.filter(lambda x, y: True), "y": None}, "assert_cardinality"),
    "epochs": ({"epochs": 1.5}, "epochs"),
}


@pytest.mark.parametrize("planned", [True, False])
@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_refused_before_the_run_begins(name, planned):
    arguments, names = BAD[name]
    model = runs.counting_model()
    options = {"plan": PLAN} if planned else {"epsilon": 2.0, "delta": 1e-5, "num_bands": 1}
    model.compile(bandmf.BandMFOptimizer("sgd", **options), runs.prediction_loss)
    arguments = {"x": X, "y": Y, "verbose": 0} | ({} if planned else {"batch_size": 8}) | arguments
    with pytest.raises((TypeError, ValueError), match=f"(?s){names}"):
        model.fit(**arguments)
    assert not model.optimizer.built and model.optimizer.plan_of_run.known == planned


def test_a_dataset_of_named_size_is_taken():
    data = DATA.filter(lambda x, y: True).apply(tf.data.experimental.assert_cardinality(96))
    short = {"epochs": 1, "steps_per_epoch": 2}
    ours = runs.fit(model_of(run_eagerly=True), data, **short)
    np.testing.assert_array_equal(ours, runs.fit(model_of(run_eagerly=True), X, y=Y, **short))


def test_data_in_the_users_own_order_is_told_apart_by_the_plan():
    """Rule 7: only a declaration lets data through as it is; `class_weight` stays refused there."""
    declared = runs.make_plan(sampling="fixed_order", max_participations=2, min_separation=12)
    fixed = runs.make_plan(sampling="fixed_order")
    for plan, way in ((declared, "own order"), (fixed, "rows"), (PLAN, "rows")):
        optimizer = bandmf.BandMFOptimizer("sgd", plan)
        assert own_batches.way_of(X, optimizer) == way
        assert own_batches.way_of(DATA.batch(8), optimizer) == way
        assert own_batches.way_of(plan.batches(X, Y), optimizer) == "batches"
    target = bandmf.BandMFOptimizer("sgd", epsilon=2.0, delta=1e-5, sampling="fixed_order")
    assert own_batches.way_of(X, target) == "rows"
    model = runs.compiled(runs.counting_model(), declared)
    for refused in ({"class_weight": {0: 1.0}}, {"validation_split": 0.5}):
        with pytest.raises(ValueError, match=next(iter(refused))):
            model.fit(X, Y, verbose=0, **refused)
