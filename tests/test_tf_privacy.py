"""The query for TF Privacy's aggregation code, with the real package."""

import collections
import importlib
import importlib.util
import sys

import dp_accounting
import numpy as np
import pytest
import scipy.stats
import tensorflow as tf

import keras_bandmf as bandmf
from keras_bandmf.noise import normals
from keras_bandmf.planning import tf_privacy as installed

needs_extra = pytest.mark.skipif(
    importlib.util.find_spec("tensorflow_privacy") is None,
    reason="the extra tf-privacy is not installed (it needs Python < 3.12 and NumPy 1)",
)


def library(name):
    """A module of TF Privacy's queries. After the first import its switch is not needed."""
    return installed.load(f"tensorflow_privacy.privacy.dp_query.{name}")


def toeplitz(num_steps=8, num_bands=3):
    return bandmf.strategies.ToeplitzStrategy.optimize(num_steps=num_steps, num_bands=num_bands)


def make_query(clip=1.0, noise=1.0, strategy=None, **options):
    return bandmf.tf_privacy.BandMFSumQuery(clip, noise, strategy or toeplitz(), **options)


def released(query, rounds, template):
    """What rounds of empty sums release, flat: (rounds, size)."""
    state, rows = query.initial_global_state(), []
    for _ in range(rounds):
        result, state, _ = query.get_noised_result(query.initial_sample_state(template), state)
        flat = [np.reshape(part, -1) for part in tf.nest.flatten(result)]
        rows.append(np.concatenate(flat))
    return np.stack(rows)


def nested(values=(3.0, 4.0)):
    """A record as TF Privacy's tests have it: tensors in tuples, lists and dictionaries."""
    first, second = (tf.constant(value) for value in values)
    return {"dense": (tf.reshape(first, [1, 1]), [second]), "bias": tf.zeros([2])}


STRATEGIES = {
    "toeplitz": lambda: toeplitz(),
    "banded": lambda: bandmf.strategies.BandedStrategy.optimize(num_steps=8, num_bands=3),
    "block": lambda: bandmf.strategies.BlockDiagonalStrategy.optimize(
        num_steps=8, num_bands=3, block_steps=4
    ),
    "inverse": lambda: bandmf.strategies.BandedInverseStrategy([1.0, -0.5, -0.1], num_steps=8),
    "one band": lambda: toeplitz(num_bands=1),
}


@needs_extra
@pytest.mark.parametrize("name", STRATEGIES)
def test_rounds_release_the_rows_of_the_inverse_matrix_times_independent_rows(name):
    strategy = STRATEGIES[name]()
    query = make_query(2.0, 1.5, strategy, seed=3)
    got = released(query, 8, {"a": tf.zeros([40, 50], tf.float64), "b": tf.zeros([7], tf.float64)})
    key = tf.constant(normals.key_from_seed(3).view(np.int64))
    pairs = [normals.standard_normals(key, step, 0, 2) for step in range(8)]
    z = np.stack([np.stack(pair, axis=1).reshape(-1)[:2007] for pair in pairs])
    assert np.allclose(got, 3.0 * np.linalg.solve(strategy.materialize(), z), atol=1e-12)


@needs_extra
def test_the_covariance_of_rounds_is_that_of_the_dense_inverse():
    strategy, size = toeplitz(), 200_000
    got = released(make_query(1.0, 2.0, strategy, seed=5), 8, tf.zeros([size]))
    inverse = np.linalg.inv(strategy.materialize())
    # Whitened by the dense matrix, 28 products and 8 squares are normal up to 1 / sqrt(size).
    # Beyond 4.5 in any of 36: 2.4e-4 of all seeds.
    white = strategy.materialize() @ got / 2.0
    score = (white @ white.T - size * np.eye(8)) / np.sqrt(size * (1.0 + np.eye(8)))
    assert np.abs(score).max() < 4.5
    covariance = got @ got.T / size
    assert np.allclose(covariance, 4.0 * inverse @ inverse.T, atol=0.1)
    # Independent noise of the same size would not pass.
    assert np.abs(covariance - np.diag(np.diag(covariance))).max() > 0.5


@needs_extra
def test_one_band_is_the_gaussian_sum_query():
    gaussian = library("gaussian_query").GaussianSumQuery(2.0, 3.0)
    query = make_query(2.0, 1.5, toeplitz(num_bands=1), seed=7)
    tf.random.set_seed(1)
    records = [tf.constant([3.0, 4.0]), tf.constant([0.5, 0.0])]
    records = [tf.tile(record, [10_000]) / 100.0 for record in records]
    run = library("test_utils").run_query
    theirs, ours = run(gaussian, records)[0].numpy(), run(query, records)[0].numpy()
    # Two samples of 20,000: below 1e-3 in one of 1,000 seeds.
    assert scipy.stats.ks_2samp(ours, theirs).pvalue > 1e-3
    state = query.initial_global_state()
    event = query.get_noised_result(tf.zeros([2]), state)[2]
    their_event = gaussian.get_noised_result(tf.zeros([2]), gaussian.initial_global_state())[2]
    assert event == dp_accounting.GaussianDpEvent(1.5)
    assert event.noise_multiplier == pytest.approx(float(their_event.noise_multiplier))
    two = query.get_noised_result(tf.zeros([20_000]), state)[0].numpy()
    state = state._replace(round=tf.constant(1, tf.int64), run=query_run(query, [20_000]))
    three = query.get_noised_result(tf.zeros([20_000]), state)[0].numpy()
    assert abs(np.corrcoef(two, three)[0, 1]) < 4.5 / np.sqrt(20_000)


def query_run(query, shape):
    return query.get_noised_result(tf.zeros(shape), query.initial_global_state())[1].run


@needs_extra
def test_without_noise_the_result_is_the_exact_clipped_sum():
    query = make_query(5.0, 0.0)
    run = library("test_utils").run_query
    records = [nested((3.0, 4.0)), nested((0.25, -0.5)), nested((30.0, -40.0))]
    result, state = run(query, records)
    shrunk = 1.0 - 2.0**-23  # what is clipped stays below the norm
    assert float(result["dense"][0][0, 0]) == pytest.approx(6.25, rel=1e-6)
    assert float(result["dense"][1][0]) == pytest.approx(-0.5, abs=1e-5)
    assert np.array_equal(result["bias"], [0.0, 0.0])
    small, _ = run(query, records[1:2])
    assert (float(small["dense"][0][0, 0]), float(small["dense"][1][0])) == (0.25, -0.5)
    clipped = query.preprocess_record(5.0, records[2])
    assert float(clipped["dense"][0][0, 0]) == np.float32(3.0 * shrunk)
    assert int(state.round) == 1
    assert isinstance(
        query.get_noised_result(tf.zeros([1]), query.initial_global_state())[2],
        dp_accounting.NonPrivateDpEvent,
    )


@needs_extra
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_no_record_is_longer_than_the_clip_norm(dtype):
    query = make_query(1.0)
    generator = np.random.default_rng(0)
    for scale in (1.0, 1e-3, 1.0000001, 1e20, 1e38):
        for _ in range(20):
            values = generator.normal(size=500)
            values = (values / np.linalg.norm(values) * scale).astype(dtype)
            clipped = query.preprocess_record(
                1.0, (tf.constant(values[:9]), tf.constant(values[9:]))
            )
            whole = np.concatenate([part.numpy() for part in clipped]).astype(np.float64)
            assert np.linalg.norm(whole) <= 1.0
            assert np.linalg.norm(whole) >= min(1.0, scale) * (1.0 - 1e-6)
    huge = query.preprocess_record(1.0, tf.constant([1e300, 1e300], tf.float64)).numpy()
    assert np.linalg.norm(huge) <= 1.0


@needs_extra
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_record_that_is_not_finite_is_zero(bad):
    record = {"a": tf.constant([1.0, bad]), "b": tf.constant([2.0])}
    clipped = make_query().preprocess_record(1.0, record)
    assert np.array_equal(clipped["a"], [0.0, 0.0]) and np.array_equal(clipped["b"], [0.0])


@needs_extra
@pytest.mark.parametrize("params", [2.0, np.inf, np.nan])
def test_parameters_cannot_raise_the_clip_norm(params):
    clipped = make_query().preprocess_record(tf.constant(params), tf.constant([30.0, 40.0]))
    assert np.linalg.norm(clipped.numpy()) <= 1.0
    assert float(make_query().preprocess_record(-1.0, tf.constant([3.0]))[0]) == 0.0


@needs_extra
@pytest.mark.parametrize("compiled", [False, True])
def test_federated_rounds(compiled):
    """20 clients fit one linear model over 6 rounds, with clipped deltas and NormalizedQuery."""
    generator = np.random.default_rng(2)
    x = generator.normal(size=(20, 30, 3)).astype("float32")
    y = x @ np.array([[1.0], [-2.0], [0.5]], "float32")
    inner = make_query(10.0, 0.01, toeplitz(6), seed=11)
    query = library("normalized_query").NormalizedQuery(inner, denominator=20.0)

    def delta(weights, x, y):
        kernel, bias = weights["kernel"], weights["bias"]
        error = x @ kernel + bias - y
        step = 0.5 / tf.cast(tf.shape(x)[0], tf.float32)
        return {"kernel": -step * tf.transpose(x) @ error, "bias": -step * tf.reduce_sum(error, 0)}

    def one_round(weights, state):
        params = query.derive_sample_params(state)
        sums = query.initial_sample_state(weights)
        for client in range(20):
            record = delta(weights, x[client], y[client])
            sums = query.accumulate_record(params, sums, record)
        mean, state, _ = query.get_noised_result(sums, state)
        return tf.nest.map_structure(tf.add, weights, mean), state, query.derive_metrics(state)

    step = tf.function(one_round) if compiled else one_round
    weights = {"kernel": tf.zeros([3, 1]), "bias": tf.zeros([1])}
    state = query.initial_global_state()
    for number in range(6):
        weights, state, metrics = step(weights, state)
        assert int(metrics["round"]) == number + 1
    assert set(metrics) == {"round", "l2_norm_clip", "noise_stddev"}  # and no key
    assert np.allclose(weights["kernel"][:, 0], [1.0, -2.0, 0.5], atol=0.1)
    with pytest.raises((bandmf.PrivacyError, tf.errors.InvalidArgumentError), match="6 rounds"):
        step(weights, state)


@needs_extra
def test_compiled_rounds_release_what_eager_ones_do():
    template = tf.zeros([1500])
    eager = released(make_query(seed=4), 4, template)
    for options in ({}, {"jit_compile": True}):
        query = make_query(seed=4)
        step = tf.function(
            lambda sums, state, q=query: q.get_noised_result(sums, state)[:2], **options
        )
        state, rows = query.initial_global_state(), []
        for _ in range(4):
            result, state = step(template, state)
            rows.append(result.numpy())
        assert np.allclose(rows, eager, atol=1e-6)


@needs_extra
def test_nested_queries_have_noise_of_their_own():
    queries = {"a": make_query(), "b": make_query(2.0)}
    query = library("nested_query").NestedSumQuery(queries)
    record = {"a": tf.ones([500]), "b": [tf.ones([500])]}
    result, state = library("test_utils").run_query(query, [record, record])
    assert not np.array_equal(state["a"].key, state["b"].key)
    assert abs(np.corrcoef(result["a"], result["b"][0])[0, 1]) < 4.5 / np.sqrt(500)
    again = query.get_noised_result(query.initial_sample_state(record), state)
    assert {int(part.round) for part in again[1].values()} == {2}


@needs_extra
def test_more_rounds_than_counted_are_refused_and_have_no_result():
    query = make_query(num_steps=2)
    zeros, state = tf.zeros([3]), query.initial_global_state()
    for _ in range(2):
        _, state, event = query.get_noised_result(zeros, state)
    assert event == dp_accounting.UnsupportedDpEvent()
    with pytest.raises(bandmf.PrivacyError, match="the 2 rounds"):
        query.get_noised_result(zeros, state)
    with pytest.raises(bandmf.PrivacyError, match="the 2 rounds"):
        query.get_noised_result(zeros, state._replace(round=tf.constant(-1, tf.int64)))
    graph = tf.function(lambda: query.get_noised_result(zeros, state)[0])
    with pytest.raises(tf.errors.InvalidArgumentError, match="the 2 rounds"):
        graph()
    # XLA leaves assertions out.
    xla = tf.function(lambda: query.get_noised_result(zeros, state)[0], jit_compile=True)
    assert np.all(np.isnan(xla()))
    silent = make_query(noise=0.0, num_steps=1)
    _, state, _ = silent.get_noised_result(zeros, silent.initial_global_state())
    xla = tf.function(lambda: silent.get_noised_result(zeros, state)[0], jit_compile=True)
    assert np.all(np.isnan(xla()))


@needs_extra
def test_a_state_of_another_run_is_refused():
    query = make_query()
    _, state, _ = query.get_noised_result(tf.zeros([3]), query.initial_global_state())
    for other, sums in (
        (query, tf.zeros([4])),
        (query, (tf.zeros([1]), tf.zeros([2]))),
        (query, tf.zeros([3], tf.float64)),
        (make_query(2.0, 0.5), tf.zeros([3])),
        (make_query(noise=2.0), tf.zeros([3])),
        (make_query(num_steps=7), tf.zeros([3])),
        (make_query(strategy=toeplitz(8, 2)), tf.zeros([3])),
    ):
        with pytest.raises(bandmf.PrivacyError, match="another run"):
            other.get_noised_result(sums, state)
    make_query().get_noised_result(tf.zeros([3]), state)  # the same query, made again


@needs_extra
def test_every_initial_state_has_a_key_of_its_own_also_in_one_graph():
    query = make_query()
    graph = tf.function(query.initial_global_state)
    keys = [state.key.numpy().tobytes() for state in (graph(), graph(), graph())]
    keys += [query.initial_global_state().key.numpy().tobytes() for _ in range(3)]
    assert len(set(keys)) == 6
    seeded = make_query(seed=1)
    assert np.array_equal(seeded.initial_global_state().key, seeded.initial_global_state().key)
    assert query.derive_sample_params(query.initial_global_state()).shape == ()


@needs_extra
def test_a_plan_gives_its_noise_strategy_and_steps():
    plan = bandmf.TrainingPlan(
        num_examples=1_000, batch_size=50, epochs=3, num_bands=4, noise_multiplier=1.3, delta=1e-5
    )
    query = bandmf.tf_privacy.BandMFSumQuery.from_plan(plan, 0.7)
    assert query.noise_stddev == plan.noise_stddev(0.7)
    assert query.num_steps == plan.num_steps
    direct = make_query(0.7, plan.noise_multiplier * plan.sensitivity, plan.strategy, seed=2)
    from_plan = bandmf.tf_privacy.BandMFSumQuery.from_plan(plan, 0.7, seed=2)
    assert np.array_equal(released(direct, 2, tf.zeros([9])), released(from_plan, 2, tf.zeros([9])))
    with pytest.raises(TypeError, match="TrainingPlan"):
        bandmf.tf_privacy.BandMFSumQuery.from_plan(plan.strategy, 1.0)


@needs_extra
@pytest.mark.parametrize(
    ("options", "error", "match"),
    [
        ({"clip": 0.0}, ValueError, "l2_norm_clip"),
        ({"clip": np.nan}, ValueError, "l2_norm_clip"),
        ({"clip": "1"}, TypeError, "l2_norm_clip"),
        ({"noise": -1.0}, ValueError, "noise_multiplier"),
        ({"noise": np.inf}, ValueError, "noise_multiplier"),
        ({"strategy": "banded"}, TypeError, "strategy"),
        ({"num_steps": 0}, ValueError, "num_steps"),
        ({"num_steps": 9}, ValueError, "8 steps"),
        ({"num_steps": 2.0}, TypeError, "num_steps"),
        ({"seed": 1.5}, TypeError, "seed"),
    ],
)
def test_bad_arguments(options, error, match):
    with pytest.raises(error, match=match):
        make_query(**options)


@needs_extra
def test_what_would_make_the_guarantee_untrue_is_refused(monkeypatch):
    with pytest.raises(bandmf.PrivacyError, match="float32"):
        make_query(1e-30)
    monkeypatch.setenv("XLA_FLAGS", "--xla_cpu_enable_fast_math=true")
    with pytest.raises(bandmf.PrivacyError, match="fast_math"):
        make_query()


@needs_extra
def test_bad_records():
    query = make_query()
    state = query.initial_global_state()
    for bad in (tf.constant([1]), tf.constant([1.0], tf.float16), tf.constant(["a"])):
        with pytest.raises(TypeError, match="float32 or float64"):
            query.preprocess_record(1.0, bad)
        with pytest.raises(TypeError, match="float32 or float64"):
            query.get_noised_result(bad, state)
    for call in (
        lambda: query.preprocess_record(1.0, []),
        lambda: query.get_noised_result({}, state),
    ):
        with pytest.raises(ValueError, match="at least one tensor"):
            call()
    empty, _, _ = query.get_noised_result((tf.zeros([0]), tf.zeros([0, 3])), state)
    assert [part.shape for part in empty] == [(0,), (0, 3)]
    dynamic = tf.function(
        lambda sums: query.get_noised_result(sums, state)[0],
        input_signature=[tf.TensorSpec([None])],
    )
    with pytest.raises(ValueError, match="static shapes"):
        dynamic(tf.zeros([3]))
    ordered = collections.OrderedDict(b=tf.ones([2]), a=tf.ones([1]))
    assert list(query.get_noised_result(ordered, state)[0]) == ["b", "a"]


def test_without_the_extra_the_error_names_it(monkeypatch):
    monkeypatch.delitem(sys.modules, "keras_bandmf.tf_privacy", raising=False)
    monkeypatch.delitem(vars(bandmf), "tf_privacy", raising=False)  # `hasattr` would import it
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, package=None: None)
    with pytest.raises(ImportError, match=r"keras_bandmf\[tf-privacy\]"):
        bandmf.tf_privacy.BandMFSumQuery  # noqa: B018
    with pytest.raises(AttributeError, match="no attribute 'other'"):
        bandmf.other  # noqa: B018
