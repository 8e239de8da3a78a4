"""PrivateBatches: purity, the cursor, padding, distribution, binding, and what it refuses."""

import copy
import threading

import keras
import numpy as np
import pytest
import tensorflow as tf
from scipy import stats

from keras_bandmf.sampling import PrivateBatches, draws
from keras_bandmf.sampling.laws import LAWS
from keras_bandmf.sampling.schedule import Schedule
from tests import runs

N = 60
KEY = np.array([11, 12], np.uint64)
OTHER_KEY = np.array([11, 13], np.uint64)


def batches_of(x=None, y="labels", key=KEY, **changes):
    numbers = dict(
        num_examples=N, batch_size=10, num_steps=24, num_bands=3, sampling="cyclic_poisson"
    )
    x = np.arange(N, dtype="int32") if x is None else x
    y = np.arange(N) % 5 if isinstance(y, str) else y
    options = {name: value for name, value in changes.items() if name not in numbers}
    numbers = {name: changes.get(name, value) for name, value in numbers.items()}
    if numbers["sampling"] == "random_allocation":
        numbers["max_participations"] = max(1, round(24 * numbers["batch_size"] / N))
    schedule = Schedule(**numbers)
    made = PrivateBatches(x, y, schedule=schedule, plan_fingerprint="print", **options)
    if key is not None:
        made.bind(key)
    return made


def ids(batch):
    """Example numbers of a batch whose x are the row numbers, in increasing order."""
    return sorted(np.asarray(batch["x"])[np.asarray(batch["mask"])].tolist())


def drawn(made, t):
    return sorted(made.indices(t).tolist())


def same(one, other):
    tf.nest.map_structure(np.testing.assert_array_equal, dict(one), dict(other))


def test_attributes():
    made = batches_of(num_examples=N, batch_size=11, num_bands=2, seed=None)
    assert made.plan_fingerprint == "print"
    assert (made.num_examples, made.batch_size, made.num_steps, made.num_bands) == (N, 11, 24, 2)
    assert made.sampling == "cyclic_poisson"
    assert made.steps_per_epoch == 5
    assert len(made) == 24
    assert made.cursor == 0 and made.bound and made.seed is None


@pytest.mark.parametrize("sampling", list(LAWS))
def test_a_batch_holds_the_rows_of_its_step_and_copies_of_rows(sampling):
    x = np.random.default_rng(0).normal(size=(N, 4, 2)).astype("float32")
    y, weight = np.arange(N) + 1, np.linspace(1, 2, N)
    made = batches_of(x, y, sample_weight=weight, sampling=sampling)
    for t in range(made.num_steps):
        indices, batch = made.indices(t), made.batch(t, num_replicas=2)
        count = len(indices)
        sizes = made._schedule.padded_sizes(2)
        size = min(size for size in sizes if size >= count + 2)
        assert {leaf.shape[0] for leaf in batch.values()} == {size}
        assert batch["mask"].dtype == bool
        assert batch["mask"].sum() == count
        # Padding too holds whole rows of the data, and each replica has some.
        assert not batch["mask"].reshape(2, -1).all(axis=1).any()
        order = batch["y"] - 1
        np.testing.assert_array_equal(np.sort(order[batch["mask"]]), np.sort(indices))
        same(made.rows(order), {k: batch[k] for k in ("x", "y", "sample_weight")})


def test_places_and_copies_change_with_key_and_step_and_are_uniform():
    """Chi-square over 24 steps of 40 keys; false alarm rate 1e-4."""
    counts = np.zeros(16)  # of batches of the smaller size
    copies = np.zeros(N)
    masks = set()
    for seed in range(40):
        made = batches_of(seed=seed)
        for t in range(24):
            batch = made.batch(t)
            same(batch, made.batch(t))
            if len(batch["mask"]) == 16:
                counts += ~batch["mask"]
            copies += np.bincount(batch["x"][~batch["mask"]].astype(int), minlength=N)
            masks.add(batch["mask"].tobytes())
    assert len(masks) > 900
    assert counts.sum() > 2_000 and stats.chisquare(counts).pvalue > 1e-4
    assert stats.chisquare(copies).pvalue > 1e-4


def test_columns_that_are_not_given_are_absent():
    made = batches_of(y=None)
    assert set(made.batch(0)) == {"x", "mask"} == set(made.element_spec(1))
    assert set(next(iter(made.dataset()))) == {"x", "mask"}


def test_a_large_draw_takes_the_next_multiple_and_nothing_is_cut(monkeypatch):
    """Rule 5. At rate one a batch is a whole group; P is made too small for half of them."""
    monkeypatch.setattr(draws, "_PADDING_QUANTILES", (0.5,))
    sizes = set()
    for seed in range(20):
        made = batches_of(batch_size=8, num_bands=7, num_steps=7, seed=seed)
        for t in range(7):
            batch, indices = made.batch(t), made.indices(t)
            assert ids(batch) == indices.tolist()
            size = made.padded_size()
            assert len(batch["mask"]) == max(size, -(-(len(indices) + 1) // size) * size)
            sizes.add(len(batch["mask"]))
    assert {size, 2 * size} <= sizes


def test_forced_overflow(monkeypatch):
    """Rule 5: with P = 4 every batch comes whole, in multiples of P, through tf.data too."""
    monkeypatch.setattr(Schedule, "padded_sizes", lambda self, num_replicas=1: (4,))
    made = batches_of()
    sizes = set()
    for t, batch in enumerate(made.dataset()):
        indices = made.indices(t)
        assert ids(batch) == indices.tolist()
        assert len(batch["mask"]) == max(4, -(-(len(indices) + 1) // 4) * 4)
        sizes.add(len(batch["mask"]))
    assert max(sizes) >= 12


@pytest.mark.parametrize("replicas", [1, 2, 3])
@pytest.mark.parametrize("sampling", list(LAWS))
def test_without_few_sizes_padding_only_rounds_up(sampling, replicas):
    """Rule 5: every drawn row is there, and a masked one for each replica."""
    multiple = replicas if sampling == "fixed_order" else 8 * replicas
    made = batches_of(sampling=sampling, batch_size=12)
    for t, batch in enumerate(made.dataset(replicas, few_sizes=False)):
        mask, indices = batch["mask"].numpy(), made.indices(t)
        assert ids(batch) == sorted(indices.tolist())
        assert 0 <= len(mask) - len(indices) - replicas < multiple
        assert len(mask) % multiple == 0
        assert not mask.reshape(replicas, -1).all(axis=1).any()
        same(batch, made.batch(t, replicas, few_sizes=False))


def test_few_sizes_are_two_and_multiples_of_the_larger():
    found = set()
    made = batches_of(np.zeros(4_000), None, num_examples=4_000, batch_size=100, num_steps=300)
    for t in range(300):
        found.add(len(made.batch(t)["mask"]))
    assert found - {max(found)} <= set(made._schedule.padded_sizes())
    assert 2 <= len(found) <= 3 and made.padded_size() in found


def test_an_empty_draw_is_a_batch_of_padding():
    made = batches_of(batch_size=1, num_bands=1, num_steps=200)
    empty = [t for t in range(200) if len(made.indices(t)) == 0]
    assert len(empty) > 30
    batch = made.batch(empty[0])
    assert batch["x"].shape == (8,) and not batch["mask"].any()
    made.cursor = empty[0]
    found = next(iter(made.dataset()))
    assert found["mask"].shape == (8,) and not np.any(found["mask"])


def test_a_batch_is_a_function_of_step_and_key_alone():
    made, fresh = batches_of(), batches_of()
    first = [made.batch(t) for t in (5, 0, 23, 5)]
    made.cursor = 9
    list(made.dataset().take(3))
    same(first[0], first[3])
    for t, batch in zip((5, 0, 23), first, strict=False):
        same(fresh.batch(t), batch)
        same(made.batch(t), batch)
    assert ids(batches_of(key=OTHER_KEY).batch(5)) != ids(first[0])


def test_dataset_has_all_steps_in_order_and_then_ends():
    made = batches_of()
    drawn = list(made.dataset())
    assert len(drawn) == 24
    for t, batch in enumerate(drawn):
        same(tf.nest.map_structure(lambda leaf: leaf.numpy(), batch), made.batch(t))
    assert len(list(made)) == 24
    made.cursor = 24
    assert list(made.dataset()) == []


@pytest.mark.parametrize("ahead", [0, 1, 5])
def test_every_new_iterator_starts_at_the_cursor_whatever_was_peeked(ahead):
    """A symbolic build, peeks and prefetching draw batches that no step uses."""
    made = batches_of()
    dataset = made.dataset()
    for start in (0, 7, 3, 7):
        made.cursor = start
        iterator = iter(dataset)
        for _ in range(ahead):
            next(iterator)
        assert made.cursor == start, "drawing a batch must not move the cursor"
        assert ids(next(iter(dataset))) == drawn(made, start)


def test_an_iterator_reads_the_cursor_once():
    """Prefetching runs ahead of training: a counter read later than the start would race."""
    made = batches_of()
    iterator = iter(made.dataset())
    seen = [ids(next(iterator))]
    for step in (20, 3, 24, 0, 11):
        made.cursor = step
        seen.append(ids(next(iterator)))
    assert seen == [made.indices(t).tolist() for t in range(6)]


def test_nothing_tunes_the_dataset():
    """The thread that tunes may sleep on when its iterator is destroyed, which waits for it.

    Of 150 iterators, on two cores with other work, four took 1.4 to 39 s to destroy; without that
    thread, none took more than 0.01 s. That is a race, so this test is about the setting alone.
    """
    assert batches_of().dataset().options().autotune.enabled is False


def test_two_iterators_do_not_disturb_each_other():
    made = batches_of()
    dataset = made.dataset()
    one = iter(dataset)
    ones = [ids(next(one)) for _ in range(2)]
    made.cursor = 6
    two, other_dataset = iter(dataset), iter(made.dataset())
    twos, others = [], []
    for _ in range(5):
        twos.append(ids(next(two)))
        ones.append(ids(next(one)))
        others.append(ids(next(other_dataset)))
    assert ones == [made.indices(t).tolist() for t in range(7)]
    assert twos == others == [made.indices(t).tolist() for t in range(6, 11)]


def test_iterators_in_several_threads():
    made = batches_of()
    results = [None] * 4

    def run(slot):
        results[slot] = [ids(batch) for batch in made.dataset()]

    threads = [threading.Thread(target=run, args=(slot,)) for slot in range(4)]
    [thread.start() for thread in threads]
    [thread.join() for thread in threads]
    assert results == [[made.indices(t).tolist() for t in range(24)]] * 4


def test_element_spec_matches_nested_structures():
    x = {"ids": np.ones((N, 7), "int32"), "more": [np.ones(N), (np.ones((N, 2), bool),)]}
    made = batches_of(x, [np.ones((N, 1)), np.arange(N)])
    spec = made.element_spec(2)
    dataset = made.dataset(2)
    tf.nest.assert_same_structure(spec, dataset.element_spec)
    assert spec == dataset.element_spec
    assert spec["x"]["ids"].shape.as_list() == [None, 7]
    assert spec["x"]["more"][0].dtype == tf.float32
    assert spec["mask"].dtype == tf.bool
    for batch in dataset.take(2):
        tf.nest.map_structure(
            lambda leaf, leaf_spec: leaf_spec.is_compatible_with(leaf) or pytest.fail(), batch, spec
        )


@pytest.mark.parametrize("sampling", list(LAWS))
@pytest.mark.parametrize("forced_size", [None, 4])
def test_two_replicas_share_every_batch_evenly(sampling, forced_size, monkeypatch):
    """Every row arrives exactly once, in real rows and padding that split evenly."""
    if forced_size and sampling != "fixed_order":
        monkeypatch.setattr(Schedule, "padded_sizes", lambda self, replicas=1: (forced_size,))
    made = batches_of(sampling=sampling, batch_size=9)
    strategy = runs.mirrored()
    dataset = made.dataset(strategy.num_replicas_in_sync)
    policy = dataset.options().experimental_distribute.auto_shard_policy
    assert policy == tf.data.experimental.AutoShardPolicy.DATA
    distributed = strategy.experimental_distribute_dataset(dataset)
    for start in (0, 13):
        made.cursor = start
        steps = 0
        for t, batch in enumerate(distributed, start):
            masks = strategy.experimental_local_results(batch["mask"])
            xs = strategy.experimental_local_results(batch["x"])
            assert len(masks) == 2 and masks[0].shape == masks[1].shape
            arrived = [ids({"x": x, "mask": m}) for x, m in zip(xs, masks, strict=True)]
            assert sorted(sum(arrived, [])) == drawn(made, t)
            assert all(not np.all(mask) for mask in masks)
            steps += 1
        assert steps == 24 - start


@pytest.mark.parametrize("devices", [None, ["CPU:0"], ["CPU:0", "CPU:1"]])
def test_keras_fit_sees_every_step_once_in_order(devices):
    """The cursor set at each epoch's begin, as the private `fit` does it."""
    made = batches_of(y=None, batch_size=9)
    seen = []

    class Recorder(keras.Model):
        def __init__(self):
            super().__init__()
            self.step = tf.Variable(0, aggregation=tf.VariableAggregation.ONLY_FIRST_REPLICA)

        def call(self, inputs):
            return inputs

        def train_step(self, data):
            step = self.step.assign_add(1)
            rows = tf.boolean_mask(data["x"], data["mask"])
            tf.py_function(lambda t, x: seen.extend((int(t), int(i)) for i in x), [step, rows], [])
            return {"loss": tf.constant(0.0)}

    class Cursor(keras.callbacks.Callback):
        def on_epoch_begin(self, epoch, logs=None):
            made.cursor = int(self.model.step.numpy())

    strategy = tf.distribute.get_strategy()
    if devices:
        strategy = runs.mirrored(len(devices))
    with strategy.scope():
        model = Recorder()
        # On GPUs Keras's "auto" is XLA, which has no Python code.
        model.compile(jit_compile=False)
    # Keras's symbolic build averages a batch over replicas, which a boolean mask does not survive.
    model._maybe_symbolic_build = lambda *args, **kwargs: None
    model.fit(
        made.dataset(strategy.num_replicas_in_sync),
        epochs=4,
        steps_per_epoch=6,
        shuffle=False,
        verbose=0,
        callbacks=[Cursor()],
    )
    expected = [(t + 1, i) for t in range(24) for i in made.indices(t).tolist()]
    assert sorted(seen) == expected


def test_binding():
    made = batches_of(key=None)
    assert not made.bound
    dataset = made.dataset()
    for use in (lambda: made.indices(0), lambda: made.batch(0), lambda: iter(made)):
        with pytest.raises(RuntimeError, match="bind"):
            use()
    with pytest.raises(tf.errors.OpError, match="no sampler key"):
        next(iter(dataset))
    key = KEY.copy()
    made.bind(key)
    key[0] = 99  # the caller's array is not the sampler's
    assert ids(next(iter(dataset))) == batches_of().indices(0).tolist()
    made.bind(KEY)


def test_the_key_is_bound_for_life():
    """Rule 11: another key regroups the examples."""
    made = batches_of()
    before = made.indices(3)
    with pytest.raises(ValueError, match="plan.batches"):
        made.bind(OTHER_KEY)
    np.testing.assert_array_equal(made.indices(3), before)


def test_a_seed_binds_for_tests_and_stays():
    made = batches_of(key=None, seed=4)
    assert made.bound and made.seed == 4
    before = made.indices(3)
    made.bind(KEY)
    np.testing.assert_array_equal(made.indices(3), before)
    np.testing.assert_array_equal(batches_of(key=None, seed=4).indices(3), before)
    assert not np.array_equal(batches_of(key=None, seed=5).indices(3), before)


@pytest.mark.parametrize(
    "key, error, match",
    [
        ([1, 2], TypeError, "list"),
        (np.array([1, 2]), TypeError, "int64"),
        (tf.constant([1, 2], tf.uint64), TypeError, "EagerTensor"),
        (np.array([1, 2, 3], np.uint64), ValueError, r"\(3,\)"),
        (np.zeros(2, np.uint64), ValueError, "zeros"),
        (None, TypeError, "NoneType"),
    ],
)
@pytest.mark.parametrize("seed", [None, 3])
def test_bad_keys(key, error, match, seed):
    with pytest.raises(error, match=match):
        batches_of(key=None, seed=seed).bind(key)


def test_the_key_is_never_shown():
    key = np.array([987654321987654321, 123456789123456789], np.uint64)
    made = batches_of(key=key)
    with pytest.raises(ValueError) as caught:
        made.bind(KEY)
    for text in (repr(made), str(made), str(caught.value)):
        assert "98765432" not in text and "12345678" not in text


@pytest.mark.parametrize(
    "name",
    "take skip shuffle map repeat shard filter cache prefetch unbatch padded_batch apply zip "
    "concatenate interleave flat_map window enumerate with_options".split(),
)
def test_dataset_transformations_are_refused(name):
    with pytest.raises(AttributeError, match=rf"no `\.{name}`.*privacy statement"):
        getattr(batches_of(), name)(2)
    assert not hasattr(batches_of(), name)


def test_it_is_no_dataset_and_copies():
    made = batches_of()
    assert not isinstance(made, tf.data.Dataset)
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        made.nonsense  # noqa: B018
    same(copy.deepcopy(made).batch(2), made.batch(2))


@pytest.mark.parametrize("name", ["num_examples", "batch_size", "num_steps", "seed", "sampling"])
def test_the_plans_numbers_cannot_be_changed(name):
    with pytest.raises(AttributeError):
        setattr(batches_of(), name, 1)


@pytest.mark.parametrize("t, error", [(24, ValueError), (-1, ValueError), (1.0, TypeError)])
def test_steps_beyond_the_plan(t, error):
    with pytest.raises(error, match="`t`"):
        batches_of().indices(t)
    with pytest.raises(error, match="`t`"):
        batches_of().batch(t)


@pytest.mark.parametrize("step, error", [(25, ValueError), (-1, ValueError), (True, TypeError)])
def test_bad_cursor(step, error):
    with pytest.raises(error, match="cursor"):
        batches_of().cursor = step


@pytest.mark.parametrize("seed, error", [(-1, ValueError), ("1", TypeError), (1.5, TypeError)])
def test_bad_seed(seed, error):
    with pytest.raises(error, match="seed"):
        batches_of(seed=seed)


def test_the_batch_method_is_not_that_of_a_dataset():
    with pytest.raises(TypeError):
        batches_of().batch(4, drop_remainder=True)


@pytest.mark.parametrize("replicas, error", [(0, ValueError), (1.5, TypeError)])
def test_bad_number_of_replicas(replicas, error):
    for method in ("padded_size", "dataset", "element_spec"):
        with pytest.raises(error, match="num_replicas"):
            getattr(batches_of(), method)(replicas)
