"""Carriers from public gradients: what they are, that they stay, and the noise in them."""

import keras
import numpy as np
import pytest
import scipy.stats

import keras_bandmf as bandmf
from keras_bandmf.clipping.coordinates import coordinates_of
from tests import runs
from tests.rgp.test_run import CarriersOfEachStep, built

CLIP = 0.5


def make_model(units=5):
    """Two kernels that carry, and a head."""
    keras.utils.set_random_seed(7)
    return keras.Sequential(
        [
            keras.Input((6,)),
            keras.layers.Dense(units, activation="tanh", name="first"),
            keras.layers.Dense(4, activation="tanh", name="second"),
            keras.layers.Dense(1, use_bias=False, name="head"),
        ]
    )


def public_batches(count=3, rows=8, seed=1):
    """Batches that have main directions."""
    rng = np.random.default_rng(seed)
    scale = np.array([4, 2, 1, 0.5, 0.25, 0.1])
    return [(rng.normal(size=(rows, 6)) * scale, rng.normal(size=(rows, 1))) for _ in range(count)]


def carried_model(carriers=None, rank=2, **options):
    """With carriers of public data, or others."""
    model = make_model()
    if carriers is None:
        carriers = bandmf.public_carriers(model, public_batches(), rank, "mse", CLIP)
    return bandmf.privatize(bandmf.enable_rgp(model, rank, carriers=carriers, **options))


def private_data():
    """96 examples."""
    x = np.random.default_rng(0).normal(size=(96, 6)).astype(np.float32)
    return x, np.sign(x[:, 0]).astype(np.float32)


def dense_directions(model, batches, rank):
    """Projectors on the first eigenvectors, from gradients that are written out."""
    k1, b1, k2, b2, k3 = (v.numpy().astype(np.float64) for v in model.trainable_variables)
    grams = [np.zeros((k, k)) for k in (6, 5, 5, 4)]
    for x, y in batches:
        sums = [np.zeros((6, 5)), np.zeros((5, 4))]
        for row, target in zip(x, y, strict=True):
            h1 = np.tanh(row @ k1 + b1)
            h2 = np.tanh(h1 @ k2 + b2)
            g3 = 2 * (h2 @ k3 - target)
            g2 = (k3 @ g3) * (1 - h2**2)
            g1 = (k2 @ g2) * (1 - h1**2)
            parts = [np.outer(row, g1), g1, np.outer(h1, g2), g2, np.outer(h2, g3)]
            norm = np.sqrt(sum(np.sum(part**2) for part in parts))
            for total, part in zip(sums, (parts[0], parts[2]), strict=True):
                total += part * min(1.0, CLIP / norm)
        for i, total in enumerate(sums):
            grams[2 * i] += total @ total.T
            grams[2 * i + 1] += total.T @ total
    found = [np.linalg.eigh(gram)[1][:, -rank:] for gram in grams]
    return [v @ v.T for v in found]


def test_they_are_the_main_directions_of_clipped_public_gradients():
    model = make_model()
    batches = public_batches()
    carriers = bandmf.public_carriers(model, batches, 2, "mse", CLIP, iterations=200)
    expected = dense_directions(model, batches, 2)
    for i, (left, right) in enumerate(carriers):
        np.testing.assert_allclose(left.T @ left, np.eye(2), atol=1e-5)
        np.testing.assert_allclose(right @ right.T, np.eye(2), atol=1e-5)
        np.testing.assert_allclose(left @ left.T, expected[2 * i], atol=2e-3)
        np.testing.assert_allclose(right.T @ right, expected[2 * i + 1], atol=2e-3)
    assert all(coordinates_of(v) is None for v in model.variables)


@pytest.mark.parametrize("jit_compile", [False, True])
def test_they_stay_in_a_fit_with_bands_over_the_whole_run(jit_compile):
    model = carried_model()
    plan = runs.make_plan(num_bands=4)
    runs.compiled(model, plan, loss="mse", jit_compile=jit_compile)
    recorder = CarriersOfEachStep()
    updates = runs.fit(model, plan.batches(*private_data()), callbacks=[recorder])
    given = coordinates_of(model.trainable_variables[0]).fixed
    for pair in recorder.pairs:
        for each, expected in zip(pair, given, strict=True):
            np.testing.assert_array_equal(each, expected.astype(np.float32))
    left, right = given
    for update in updates:
        kernel = update[:30].reshape(6, 5)
        outside = (np.eye(6) - left @ left.T) @ kernel @ (np.eye(5) - right.T @ right)
        np.testing.assert_allclose(outside, 0.0, atol=1e-6)
        assert np.abs(kernel).max() > 1e-3
    assert "fixed ones that were given" in str(model.optimizer.run_state.carriers)


def test_full_rank_without_noise_is_plain_training():
    updates = []
    for rank in (None, 4):
        plan = runs.make_plan(num_bands=4, noise_multiplier=0.0)
        model = make_model(4)
        if rank is not None:
            given = bandmf.public_carriers(model, public_batches(), rank, "mse", CLIP)
            model = bandmf.enable_rgp(model, rank, carriers=given)
        model = bandmf.privatize(model)
        runs.compiled(model, plan, clip=0.3, loss="mse", inner=keras.optimizers.Adam(0.01))
        updates.append(runs.fit(model, plan.batches(*private_data(), seed=5)))
    assert np.abs(updates[0]).max() > 1e-3
    np.testing.assert_allclose(updates[1], updates[0], atol=2e-5)


def test_noise_has_the_covariance_of_c_over_the_whole_run():
    """dR of an update is the noise row itself. Chi-square; false-alarm rate 1e-4."""
    model = keras.Sequential(
        [keras.Input((40,)), keras.layers.Dense(50, use_bias=False, kernel_initializer="zeros")]
    )
    rng = np.random.default_rng(3)
    given = [(rng.normal(size=(40, 20)), rng.normal(size=(20, 50)))]
    bandmf.enable_rgp(model, 20, layers=[model.layers[0]], carriers=given)
    plan = runs.make_plan(num_bands=4, noise_multiplier=2.0)
    runs.compiled(bandmf.privatize(model), plan)
    data = np.zeros((96, 40), np.float32), np.zeros(96, np.float32)
    updates = runs.fit(model, plan.batches(*data))
    left = np.linalg.qr(given[0][0])[0]
    rows = [(left.T @ update.reshape(40, 50)).ravel() for update in updates]
    statistic, degrees = runs.whitened_statistic(plan, np.array(rows))
    assert scipy.stats.chi2.ppf(5e-5, degrees) < statistic < scipy.stats.chi2.isf(5e-5, degrees)


def test_two_replicas_take_the_steps_of_one():
    plan = runs.make_plan(num_bands=4)
    given = bandmf.public_carriers(make_model(), public_batches(), 2, "mse", CLIP)
    updates = []
    for replicas in (1, 2):
        model = runs.compiled_in_scope(replicas, lambda: carried_model(given), plan, loss="mse")
        updates.append(runs.fit(model, plan.batches(*private_data(), seed=5)))
    np.testing.assert_allclose(updates[1], updates[0], atol=2e-4)


def test_carriers_that_are_not_orthonormal_are_made_so():
    """Longer ones would lengthen a contribution past the clip norm, and hide it from its norm."""
    given = bandmf.public_carriers(make_model(), public_batches(), 2, "mse", CLIP)
    longer = [(3 * left, 3 * right) for left, right in given]
    model = carried_model(longer)
    built(model, runs.make_plan())
    x, y = private_data()
    for i in range(4):
        clipped = bandmf.clipped_gradients(
            model, x[i : i + 1], y[i : i + 1], l2_norm_clip=1e-3, loss="mse"
        )
        norm = np.sqrt(sum(np.sum(np.square(total)) for total in clipped.sums))
        np.testing.assert_allclose(norm, 1e-3, rtol=1e-5)


def test_a_restored_run_keeps_the_carriers_it_began_with(tmp_path):
    plan = runs.make_plan(num_bands=4)
    first = built(carried_model(), plan, replay=True)
    runs.fit(first, plan.batches(*private_data()), epochs=1, steps_per_epoch=9)
    given = bandmf.public_carriers(make_model(), public_batches(seed=8), 2, "mse", CLIP)
    other = built(carried_model(given), plan, replay=True, seed=9)
    first.save_weights(tmp_path / "run.weights.h5")
    other.load_weights(tmp_path / "run.weights.h5")
    expected = runs.fit(built(carried_model(), plan, replay=True), plan.batches(*private_data()))
    updates = runs.fit(other, plan.batches(*private_data()), epochs=2)
    np.testing.assert_allclose(updates, expected[9:], atol=1e-6)
    moving = bandmf.privatize(bandmf.enable_rgp(make_model(), 2))
    state = built(moving, runs.make_plan(num_bands=1)).optimizer.run_state
    with pytest.raises(ValueError, match="another run"):
        state.from_arrays(first.optimizer.run_state.to_arrays(), replay=False)


def dead_head():
    """A head at zero, past which no gradient goes."""
    model = make_model()
    model.layers[-1].kernel.assign(np.zeros((4, 1)))
    bandmf.public_carriers(model, public_batches(), 2, "mse")


def found(batches=None, model=None, **options):
    """Carriers."""
    batches = public_batches() if batches is None else batches
    return bandmf.public_carriers(model or make_model(), batches, 2, "mse", **options)


def distributed():
    """In a scope of two replicas."""
    with runs.mirrored(2).scope():
        found()


def changed(change):
    """Enables carriers after a change to them."""
    given = found()
    change(given)
    carried_model(given)


MISUSES = {
    "no_batches": (lambda: found([]), "at least one batch"),
    "a_generator": (lambda: found(iter(public_batches())), "not a generator"),
    "no_pairs": (lambda: found([np.zeros((3, 6))]), "pairs"),
    "nan": (
        lambda: found([(np.full((3, 6), np.nan), np.zeros((3, 1)))]),
        "gradients that are finite",
    ),
    "dead_head": (dead_head, "head that starts at zero"),
    "carriers_on_carriers": (lambda: found(model=carried_model()), "merge_rgp"),
    "distributed": (distributed, "outside `Strategy.scope"),
    "no_iterations": (lambda: found(iterations=0), "`iterations`"),
    "unbuilt": (lambda: found(model=keras.Sequential([keras.layers.Dense(3)])), "not built"),
    "other_rank": (lambda: carried_model(found(), rank=3), r"\(6, 3\)"),
    "missing": (lambda: changed(lambda given: given.pop()), "1 pairs for 2"),
    "not_finite": (lambda: changed(lambda given: given[1][0].fill(np.nan)), "finite arrays"),
    "too_large": (
        lambda: changed(lambda given: given.append((given.pop()[0] * 1.0, np.full((2, 4), 1e308)))),
        "finite arrays",
    ),
    "no_pair": (lambda: changed(lambda given: given.append(given.pop()[0])), "to be a pair"),
    "refreshes": (lambda: carried_model(found(), refresh_every=4), "`refresh_every`"),
    "restart": (lambda: carried_model(found(), restart=True), "`restart`"),
}


@pytest.mark.parametrize("name", MISUSES)
def test_misuse_is_refused_with_a_way_out(name):
    misuse, message = MISUSES[name]
    with pytest.raises(ValueError, match=message):
        misuse()


def test_carriers_of_another_type_are_refused():
    with pytest.raises(TypeError, match="public_carriers"):
        carried_model({1: 2})
