"""The audit of one run: what the attacker is given, what he finds, and what is refused."""

import keras
import numpy as np
import pytest

import keras_bandmf as bandmf
from keras_bandmf.audit.one_run import _numbers_of_guesses, audit_run
from keras_bandmf.audit.participations import known_steps, log_likelihood_ratios
from keras_bandmf.audit.released import Attacker, filtered, recording
from keras_bandmf.clipping.modes import ClippingMode
from keras_bandmf.optimizers import bandmf as optimizer_file

LAWS = [
    {"sampling": "cyclic_poisson"},
    {"sampling": "fixed_order"},
    {"sampling": "random_allocation", "max_participations": 1},
]


def make_plan(num_examples=2_000, num_steps=10, noise_multiplier=1.0, **changes):
    """A plan of one epoch."""
    arguments = {
        "num_examples": num_examples,
        "batch_size": num_examples // num_steps,
        "num_steps": num_steps,
        "noise_multiplier": noise_multiplier,
        "delta": 1e-5,
        "num_bands": 4,
        "sampling": "fixed_order",
    }
    return bandmf.TrainingPlan(**(arguments | changes))


def build(plan, slope=1.0, clipping="flat", **options):
    """A model with one weight for each example, which moves that weight and no other."""
    ids = keras.layers.Embedding(plan.num_examples, 1, embeddings_initializer="zeros")
    model = keras.Sequential([keras.Input((1,), dtype="int32"), ids, keras.layers.Flatten()])
    bandmf.privatize(model)
    optimizer = bandmf.BandMFOptimizer(
        keras.optimizers.SGD(1.0), plan, l2_norm_clip=1.0, clipping=clipping, seed=3
    )
    model.compile(optimizer, loss=lambda _, y_pred: slope * y_pred[:, 0], **options)
    return model


def data(plan):
    """The number of each example, which is also its canary."""
    rows = np.arange(plan.num_examples, dtype=np.int32)[:, None]
    return rows, np.zeros(plan.num_examples, np.float32)


def audited(plan, slope=1.0, **options):
    """The bound and the epsilon, with every row a canary in a coordinate of its own."""
    rows = data(plan)
    options = {"canaries": rows, "seed": 0} | options
    report = audit_run(lambda: build(plan, slope), plan, *rows, **options)
    assert report.epsilon == plan.epsilon()
    return report


@pytest.mark.parametrize("law", LAWS, ids=lambda law: law["sampling"])
def test_a_clean_run_stays_below_its_epsilon_and_is_not_found_private_for_nothing(law):
    report = audited(make_plan(**law))
    assert 0.2 < report.epsilon_lower_bound < report.epsilon


@pytest.mark.parametrize("attack", ["white-box", "black-box"])
@pytest.mark.parametrize("law", LAWS[:2], ids=lambda law: law["sampling"])
def test_a_run_almost_without_noise_is_caught(monkeypatch, attack, law):
    true = optimizer_file.noise_stddev
    monkeypatch.setattr(optimizer_file, "noise_stddev", lambda *a: 0.05 * true(*a))
    report = audited(make_plan(noise_multiplier=1.5, num_bands=1, **law), attack=attack)
    assert report.epsilon_lower_bound > report.epsilon


def test_a_run_without_clipping_is_caught(monkeypatch):
    plan = make_plan(noise_multiplier=2.0)
    assert audited(plan, slope=10.0).epsilon_lower_bound < plan.epsilon()
    monkeypatch.setattr(ClippingMode, "factors", lambda self, norms, *_: norms * 0 + 1.0)
    assert audited(plan, slope=10.0).epsilon_lower_bound > plan.epsilon()


@pytest.mark.slow
def test_half_the_noise_is_caught_with_many_canaries(monkeypatch):
    plan = make_plan(20_000, noise_multiplier=1.5)
    assert audited(plan, fractions=[0.04]).epsilon_lower_bound < plan.epsilon()
    true = optimizer_file.noise_stddev
    monkeypatch.setattr(optimizer_file, "noise_stddev", lambda *a: 0.5 * true(*a))
    assert audited(plan, fractions=[0.04]).epsilon_lower_bound > plan.epsilon()


def test_wrong_classes_are_canaries_by_default():
    plan = make_plan(60, 6, num_bands=2)
    x = np.random.default_rng(0).normal(size=(60, 4)).astype(np.float32)
    seen = []

    def make(loss, units):
        model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(units)])
        bandmf.privatize(model).compile(bandmf.BandMFOptimizer("sgd", plan), loss=loss)
        true = model.fit

        def fit(batches, **options):
            seen.append(batches.rows(np.arange(60)))
            return true(batches, **options)

        model.fit = fit
        return model

    numbers = np.arange(60) % 3
    sparse = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    one_hot = keras.losses.CategoricalCrossentropy(from_logits=True)
    for loss, y, attack in (
        (sparse, numbers, "white-box"),
        (one_hot, np.eye(3, dtype=np.float32)[numbers], "black-box"),
    ):
        report = audit_run(
            lambda loss=loss: make(loss, 3), plan, x, y, num_canaries=20, attack=attack, seed=0
        )
        rows = seen.pop()
        changed = rows["y"] != y if y.ndim == 1 else (rows["y"] != y).any(axis=1)
        assert changed.sum() == 20
        np.testing.assert_array_equal(rows["x"], x)
        # The coins are the weights of the canaries, and of nothing else.
        assert set(rows["sample_weight"]) == {0.0, 1.0}
        assert rows["sample_weight"][changed].sum() == len(report.scores_in)
        assert (rows["sample_weight"][~changed] == 1).all()
        assert len(report.scores_in) + len(report.scores_out) == 20


@pytest.mark.parametrize("options", [{}, {"run_eagerly": True}, {"jit_compile": True}])
def test_what_is_recorded_is_the_released_sum_of_each_step(options):
    plan = make_plan(60, 6, noise_multiplier=1e-4, sampling="cyclic_poisson", num_bands=2)
    model, (x, y) = build(plan, **options), data(plan)
    weights = np.ones(60, np.float32)
    weights[::3] = 0.0  # the blank rows take part and contribute nothing
    with recording(model, plan) as recorder:
        model.fit(plan.batches(x, y, sample_weight=weights), verbose=0, callbacks=[recorder])
        releases = recorder.releases()
        draws = plan.schedule.draws(model.optimizer.run_state.sampler_key)
        expected = np.zeros((6, 60))
        for t in range(6):
            expected[t, draws.indices(t)] = 1.0
        np.testing.assert_allclose(releases.sums, expected * weights, atol=5e-3)
        before = -np.cumsum(releases.sums, axis=0) / plan.schedule.expected_batch_size
        np.testing.assert_allclose(releases.weights[1:], before[:-1], atol=1e-5)
        assert not releases.weights[0].any()
    assert "apply" not in vars(model.optimizer.inner_optimizer)


def test_of_adaptive_clipping_the_attacker_knows_the_norm_of_each_step():
    """Of releases almost without noise nothing is left when he takes off what he knows."""
    plan = make_plan(60, 6, noise_multiplier=1e-4, num_bands=2)
    model, (x, y) = build(plan, slope=3.0, clipping="adaptive"), data(plan)
    with recording(model, plan) as recorder:
        model.fit(plan.batches(x, y), verbose=0, callbacks=[recorder])
        releases = recorder.releases()
        draws = plan.schedule.draws(model.optimizer.run_state.sampler_key)
        attacker = Attacker(model, plan, releases, x, y)
        assert len(set(releases.clip_norms)) == 6
        for t in range(6):
            rows = np.asarray(draws.indices(t))
            assert np.abs(releases.sums[t]).max() > 0.5
            np.testing.assert_allclose(attacker.without(t, rows), 0.0, atol=5e-3)


def test_penalties_of_the_weights_are_no_part_of_the_release():
    plan = make_plan(60, 6, noise_multiplier=1e-4, num_bands=2)
    dense = keras.layers.Dense(1, kernel_regularizer=keras.regularizers.L2(0.5))
    model = bandmf.privatize(keras.Sequential([keras.Input((3,)), dense]))
    model.compile(bandmf.BandMFOptimizer("sgd", plan, l2_norm_clip=1.0), loss="mse")
    with recording(model, plan) as recorder:
        x, y = np.zeros((60, 3), np.float32), np.zeros(60, np.float32)
        model.fit(plan.batches(x, y), verbose=0, callbacks=[recorder])
        np.testing.assert_allclose(recorder.releases().sums, 0.0, atol=5e-3)


@pytest.mark.parametrize("strategy", ["toeplitz", "banded"])
def test_the_matched_filter_is_that_of_dense_matrices(strategy):
    plan = make_plan(120, 12, num_bands=3, strategy=strategy)
    c = plan.strategy.materialize()
    sums = np.random.default_rng(0).normal(size=(12, 5))
    found = list(filtered(sums, plan))
    np.testing.assert_allclose([v for v, _ in found], c.T @ c @ sums, atol=1e-12)
    np.testing.assert_allclose([e for _, e in found], np.square(c).sum(axis=0), atol=1e-12)


def test_the_attacker_is_told_what_the_accounting_gives_away():
    rows = np.arange(0, 60, 3)
    key = np.array([1, 2], np.uint64)
    for law in LAWS[1:]:
        plan = make_plan(60, 6, num_bands=2, **law)
        draws = plan.schedule.draws(key)
        possible, groups = known_steps(plan, draws, rows)
        assert groups is None
        for t in range(6):
            assert set(rows[possible[t]]) == set(rows) & set(draws.indices(t))
    plan = make_plan(60, 6, num_bands=2, sampling="cyclic_poisson")
    draws = plan.schedule.draws(key)
    possible, groups = known_steps(plan, draws, rows)
    # Whole groups, and not the steps that were drawn from them.
    assert (possible.sum(axis=0) == 3).all()
    assert len(set(groups)) == 2
    for t in range(6):
        assert set(rows) & set(draws.indices(t)) <= set(rows[possible[t]])


def test_nothing_is_known_of_secret_steps(monkeypatch):
    plan = make_plan(60, 6, num_bands=2, sampling="cyclic_poisson")
    object.__setattr__(plan, "certificate", object())
    rows = np.arange(10)
    possible, groups = known_steps(plan, plan.schedule.draws(np.array([1, 2], np.uint64)), rows)
    assert possible.all()
    assert groups is None


def test_scores_are_the_likelihood_ratios_of_the_law():
    evidence = np.random.default_rng(0).normal(size=(7, 5))
    plan = make_plan(70, 7, num_bands=2, sampling="cyclic_poisson")
    q = plan.sampling_probability
    terms = np.log(1 - q + q * np.exp(evidence))
    groups = np.array([0, 1, 0, 1, 1])
    of_group = np.stack([terms[0::2].sum(axis=0), terms[1::2].sum(axis=0)])
    known = log_likelihood_ratios(plan, evidence, groups)
    np.testing.assert_allclose(known, of_group[groups, np.arange(5)], rtol=1e-9)
    object.__setattr__(plan, "certificate", object())
    secret = log_likelihood_ratios(plan, evidence, None)
    np.testing.assert_allclose(secret, np.log(np.exp(of_group).mean(axis=0)), rtol=1e-9)
    fixed = make_plan(70, 7, num_bands=2)
    np.testing.assert_allclose(log_likelihood_ratios(fixed, evidence, None), evidence.sum(axis=0))


@pytest.mark.parametrize("count", [2, 3, 10, 101])
def test_guesses_are_pairs_and_no_more_than_canaries(count):
    numbers = _numbers_of_guesses([0.001, 0.5, 1.0], count)
    assert all(number % 2 == 0 and 2 <= number <= count for number in numbers)
    assert numbers == sorted(set(numbers))


@pytest.mark.parametrize(
    ("changes", "error", "words"),
    [
        ({"plan": None}, TypeError, "TrainingPlan"),
        ({"x": np.zeros((59, 1), np.int32)}, ValueError, "60 rows"),
        ({"x": np.zeros((0, 1), np.int32)}, ValueError, "60 rows"),
        ({"y": np.full(60, np.nan)}, ValueError, "finite"),
        ({"y": np.linspace(0, 1, 60)}, ValueError, "class numbers"),
        ({"y": np.zeros(60)}, ValueError, "at least two classes"),
        ({"attack": "grey-box"}, ValueError, "attack"),
        ({"confidence": 1.0}, ValueError, "confidence"),
        ({"confidence": float("nan")}, ValueError, "confidence"),
        ({"fractions": []}, ValueError, "fractions"),
        ({"fractions": [1.5]}, ValueError, "fractions"),
        ({"fractions": [0.0]}, ValueError, "fractions"),
        ({"num_canaries": 1}, ValueError, "num_canaries"),
        ({"num_canaries": 61}, ValueError, "num_canaries"),
        ({"num_canaries": 2.5}, TypeError, "num_canaries"),
        ({"canaries": np.zeros(3)}, TypeError, "tuple"),
        ({"canaries": (np.zeros((4, 2)), np.zeros(4))}, ValueError, r"canaries\[0\]"),
        ({"canaries": (np.zeros((4, 1)), np.zeros(5))}, ValueError, r"canaries\[1\]"),
        ({"canaries": (np.zeros((4, 1)), np.zeros(4)), "num_canaries": 5}, ValueError, "number"),
        ({"seed": -1}, ValueError, "seed"),
    ],
)
def test_bad_arguments_are_refused_before_training(changes, error, words):
    plan = make_plan(60, 6, num_bands=2)
    x, y = np.zeros((60, 1), np.int32), np.arange(60) % 3
    arguments = {"plan": plan, "x": x, "y": y} | changes

    def never():
        pytest.fail("the model was built")

    with pytest.raises(error, match=words):
        audit_run(never, **arguments)


def test_models_that_do_not_fit_are_refused():
    plan, other = make_plan(60, 6, num_bands=2), make_plan(60, 6, num_bands=3)
    x, y = data(plan)
    with pytest.raises(ValueError, match="of another plan"):
        audit_run(lambda: build(other), plan, x, y, canaries=(x, y))
    with pytest.raises(bandmf.PrivacyError, match="not private"):
        audit_run(lambda: keras.Sequential([keras.layers.Dense(1)]), plan, x, y, canaries=(x, y))
    used = build(plan)
    used.fit(plan.batches(x, y), verbose=0, epochs=1, steps_per_epoch=1)
    with pytest.raises(bandmf.PrivacyError, match="not trained yet"):
        audit_run(lambda: used, plan, x, y, canaries=(x, y))
    several = build(plan, steps_per_execution=2)
    with pytest.raises(bandmf.PrivacyError, match="steps_per_execution=2"):
        audit_run(lambda: several, plan, x, y, canaries=(x, y))
    users = make_plan(60, 6, num_bands=2, unit="user")
    with pytest.raises(ValueError, match="single rows"):
        audit_run(lambda: build(users), users, x, y, canaries=(x, y))
