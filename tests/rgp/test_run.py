"""Private training with carriers: noise, reconstruction, refresh, replicas, restore."""

import keras
import numpy as np
import pytest
import scipy.stats
import tensorflow as tf

import keras_bandmf as bandmf
from keras_bandmf.clipping.coordinates import coordinates_of
from keras_bandmf.rgp.run import RunCarriers
from tests import runs


def block_plan(num_bands=3, block_steps=4, num_steps=24, **changes):
    """A plan whose noise restarts every `block_steps`."""
    strategy = bandmf.strategies.BlockDiagonalStrategy.optimize(
        num_steps, num_bands, block_steps, max_iterations=30
    )
    return runs.make_plan(num_bands=None, num_steps=num_steps, strategy=strategy, **changes)


def small_model(rank=None, refresh_every=1, **options):
    """Two Dense layers, carriers on the first."""
    keras.utils.set_random_seed(7)
    model = keras.Sequential(
        [
            keras.Input((6,)),
            keras.layers.Dense(5, activation="tanh"),
            keras.layers.Dense(1),
        ]
    )
    if rank is not None:
        bandmf.enable_rgp(model, rank, refresh_every=refresh_every, **options)
    return bandmf.privatize(model)


def small_data():
    """96 examples."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(96, 6)).astype(np.float32)
    return x, np.sign(x[:, 0]).astype(np.float32)


@pytest.mark.parametrize(("warmup_steps", "at_least", "at_most"), [(0, 0.0, 0.98), (5, 0.99, 1.01)])
def test_with_warmup_the_first_carriers_follow_the_weights(warmup_steps, at_least, at_most):
    model = small_model(2, warmup_steps=warmup_steps)
    kernel = model.trainable_variables[0]
    u, v = np.linspace(1, 2, 6), np.linspace(-1, 1, 5)
    noise = np.random.default_rng(0).normal(size=(6, 5))
    kernel.assign(np.outer(u, v) + 1e-3 * noise)
    runs.compiled(model, runs.make_plan(num_bands=1), loss="mse").optimizer.build(
        model.trainable_variables
    )
    left, right = (c.numpy() for c in coordinates_of(kernel).pair())
    for inside in (left.T @ (u / np.linalg.norm(u)), right @ (v / np.linalg.norm(v))):
        assert at_least < np.linalg.norm(inside) < at_most


class CarriersOfEachStep(keras.callbacks.Callback):
    """Records L and R of the first variable before each step."""

    def __init__(self):
        super().__init__()
        self.pairs = []

    def on_train_batch_begin(self, batch, logs=None):
        """Copies them."""
        carrier = coordinates_of(self.model.trainable_variables[0])
        self.pairs.append([c.numpy() for c in carrier.pair()])


@pytest.mark.parametrize("inner", ["momentum", "adamw"])
@pytest.mark.parametrize("refresh_every", [1, 4])
def test_full_rank_without_noise_is_plain_training(inner, refresh_every):
    """Step for step, the clip at work: a full tangent space holds every gradient."""
    inners = {
        "momentum": lambda: keras.optimizers.SGD(0.5, momentum=0.9),
        "adamw": lambda: keras.optimizers.AdamW(0.05, weight_decay=0.01),
    }
    updates = []
    for rank in (None, 5):
        plan = block_plan(noise_multiplier=0.0) if rank else runs.make_plan(noise_multiplier=0.0)
        if refresh_every == 1:
            plan = runs.make_plan(num_bands=1, noise_multiplier=0.0)
        elif not rank:  # the same bands, hence the same batches
            plan = runs.make_plan(num_bands=3, noise_multiplier=0.0)
        model = runs.compiled(
            small_model(rank, refresh_every), plan, clip=0.3, inner=inners[inner](), loss="mse"
        )
        batches = plan.batches(*small_data(), seed=5)
        updates.append(runs.fit(model, batches))
    assert np.abs(updates[0]).max() > 1e-3
    np.testing.assert_allclose(updates[1], updates[0], atol=2e-5)


def noise_kernel(rank, refresh_every):
    """A kernel of 40 x 50 that feels the noise alone."""
    model = keras.Sequential(
        [keras.Input((40,)), keras.layers.Dense(50, use_bias=False, kernel_initializer="zeros")]
    )
    bandmf.enable_rgp(model, rank, layers=[model.layers[0]], refresh_every=refresh_every)
    return bandmf.privatize(model)


@pytest.mark.parametrize("num_bands,refresh_every", [(3, 4), (4, 4), (1, 1)])
def test_noise_has_the_covariance_of_c_in_the_coordinates_of_each_step(num_bands, refresh_every):
    """dR of an update is the noise row itself; white after C, across refreshes too.

    Chi-square over 24 steps; false-alarm rate 1e-4. Nothing leaves the tangent space.
    """
    plan = block_plan(num_bands, refresh_every, noise_multiplier=2.0)
    model = runs.compiled(noise_kernel(20, refresh_every), plan)
    recorder = CarriersOfEachStep()
    data = np.zeros((96, 40), np.float32), np.zeros(96, np.float32)
    updates = runs.fit(model, plan.batches(*data), callbacks=[recorder])
    rows, energy = [], []
    for update, (left, right) in zip(updates, recorder.pairs, strict=True):
        dw = update.reshape(40, 50)
        np.testing.assert_allclose(left.T @ left, np.eye(20), atol=1e-5)
        outside = dw - left @ (left.T @ dw)
        np.testing.assert_allclose(outside, outside @ right.T @ right, atol=1e-5)
        rows.append((left.T @ dw).ravel())
        energy.append(np.sum(np.square(dw)))
    statistic, degrees = runs.whitened_statistic(plan, np.array(rows))
    assert statistic < scipy.stats.chi2.isf(1e-4, degrees)
    # r (m + n) - r^2 directions, no more: the first rows of a block are white.
    unit = plan.noise_stddev(1.0) / plan.batch_size / plan.strategy.materialize()[0, 0]
    first = np.sum(energy[::refresh_every]) / unit**2
    count = len(energy[::refresh_every]) * (20 * 90 - 400)
    assert abs(first - count) < scipy.stats.norm.isf(5e-5) * np.sqrt(2 * count)


def test_carriers_follow_the_history_and_stay_in_place_between_refreshes():
    plan = block_plan(3, 4, noise_multiplier=0.0)
    model = runs.compiled(small_model(2, 4), plan, clip=1.0, loss="mse")
    start = model.trainable_variables[0].numpy()
    recorder, weights = CarriersOfEachStep(), runs.WeightsOfEachStep()
    model.fit(
        plan.batches(*small_data(), seed=5), epochs=2, verbose=0, callbacks=[recorder, weights]
    )
    kernels = [start, *(w[:30].reshape(6, 5) for w in weights.weights)]
    for step, (left, right) in enumerate(recorder.pairs):
        if step % 4:
            np.testing.assert_array_equal(left, recorder.pairs[step - 1][0])
            continue
        if step == 0:
            continue
        history = kernels[step] - start
        previous = recorder.pairs[step - 1]
        expected = np.linalg.qr(history @ previous[1].T)[0]
        np.testing.assert_allclose(left @ left.T, expected @ expected.T, atol=1e-3)
        expected = np.linalg.qr(history.T @ left)[0]
        np.testing.assert_allclose(right.T @ right, expected @ expected.T, atol=1e-3)


def test_warm_up_follows_the_weights_themselves():
    plan = runs.make_plan(num_bands=1, noise_multiplier=0.0)
    model = runs.compiled(small_model(2, warmup_steps=12), plan, loss="mse")
    recorder, weights = CarriersOfEachStep(), runs.WeightsOfEachStep()
    start = model.trainable_variables[0].numpy()
    model.fit(
        plan.batches(*small_data(), seed=5), epochs=2, verbose=0, callbacks=[recorder, weights]
    )
    for step in (5, 20):
        kernel = weights.weights[step - 1][:30].reshape(6, 5)
        history = kernel if step < 12 else kernel - start
        expected = np.linalg.qr(history @ recorder.pairs[step - 1][1].T)[0]
        left = recorder.pairs[step][0]
        np.testing.assert_allclose(left @ left.T, expected @ expected.T, atol=1e-3)


@pytest.mark.parametrize("restart", [False, True])
def test_carriers_of_the_weights_settle_unless_they_restart(restart):
    """The weights stand still: from step to step the carriers turn only where they are redrawn."""
    plan = runs.make_plan(num_bands=1, noise_multiplier=0.0)
    inner = keras.optimizers.SGD(0.0)
    model = small_model(2, warmup_steps=plan.num_steps, restart=restart)
    runs.compiled(model, plan, loss="mse", inner=inner)
    recorder = CarriersOfEachStep()
    model.fit(plan.batches(*small_data()), epochs=2, verbose=0, callbacks=[recorder])
    carrier = coordinates_of(model.trainable_variables[0])
    weights = model.trainable_variables[0].numpy()
    lefts = np.array([left for left, _ in recorder.pairs])
    for left in lefts:
        np.testing.assert_allclose(left.T @ left, np.eye(2), atol=1e-5)
    # Cosines of the angles between the planes of one step and the next.
    cosines = np.linalg.svd(np.swapaxes(lefts[:-1], 1, 2) @ lefts[1:], compute_uv=False)
    if not restart:
        assert cosines[-4:].min() > 0.999
        return
    assert np.median(cosines[:, 1]) < 0.9
    key = tf.constant(carrier.to_arrays()["key"])
    for step in (1, 7, 20):
        _, right = carrier._drawn(key, tf.constant(step, tf.int64))
        expected = np.linalg.qr(weights @ right.numpy().T)[0]
        np.testing.assert_allclose(lefts[step] @ lefts[step].T, expected @ expected.T, atol=1e-3)


@pytest.mark.parametrize("restart", [False, True])
def test_two_replicas_take_the_steps_of_one_with_equal_carriers(restart):
    plan = block_plan(3, 4, noise_multiplier=1.0)
    updates = []

    def make():
        return small_model(2, 4, restart=restart)

    for replicas in (1, 2):
        model = runs.compiled_in_scope(replicas, make, plan, loss="mse")
        updates.append(runs.fit(model, plan.batches(*small_data(), seed=5)))
    np.testing.assert_allclose(updates[1], updates[0], atol=2e-4)
    carrier = coordinates_of(model.trainable_variables[0])
    for name in ("left", "right"):
        one, two = runs.mirrored(2).experimental_local_results(carrier._state[name])
        np.testing.assert_array_equal(one.numpy(), two.numpy())


def test_what_is_applied_is_a_function_of_the_sum_over_replicas():
    """Also where copies of the carriers came apart."""
    strategy = runs.mirrored(2)
    with strategy.scope():
        model = small_model(2)
        carriers = RunCarriers(
            model.trainable_variables[:1], bandmf.strategies.ToeplitzStrategy.optimize(4, 1)
        )
        carriers.start(np.array([5, 6], np.uint64))
    carrier = coordinates_of(model.trainable_variables[0])
    rng = np.random.default_rng(0)
    carrier._copies("left")[1].assign(np.linalg.qr(rng.normal(size=(6, 2)))[0])
    lefts, rights = ([c.numpy() for c in carrier._copies(name)] for name in ("left", "right"))
    whole = rng.normal(size=carriers.shapes[0]).astype(np.float32)

    @tf.function(autograph=False)
    def applied():
        def gradient():
            return carriers.gradients([tf.constant(whole)])[0] / 2.0

        return strategy.reduce("SUM", strategy.run(gradient), axis=None)

    d_left, d_right = np.split(whole, [12])
    d_left, d_right = d_left.reshape(6, 2), d_right.reshape(2, 5)
    expected = [
        left @ d_right + (d_left - left @ (left.T @ d_left)) @ right
        for left, right in zip(lefts, rights, strict=True)
    ]
    np.testing.assert_allclose(applied(), np.mean(expected, axis=0), atol=1e-5)


def built(model, plan, **options):
    """Compiled, its optimizer built, as before a restore."""
    model = runs.compiled(model, plan, loss="mse", **options)
    model.optimizer.build(model.trainable_variables)
    return model


@pytest.mark.parametrize("restart", [False, True])
@pytest.mark.parametrize("road", ["weights", "checkpoint"])
def test_a_restored_run_goes_on_with_its_carriers(road, restart, tmp_path):
    """Interrupted within a block: with replay nothing differs from a run in one go."""
    plan = block_plan(3, 4, noise_multiplier=1.0)

    def make():
        return small_model(2, 4, restart=restart)

    model = built(make(), plan, replay=True)
    runs.fit(model, plan.batches(*small_data()), epochs=1, steps_per_epoch=9)
    other = built(make(), plan, replay=True, seed=9)
    before = coordinates_of(other.trainable_variables[0]).to_arrays()
    if road == "weights":
        model.save_weights(tmp_path / "run.weights.h5")
        other.load_weights(tmp_path / "run.weights.h5")
    else:
        saved = tf.train.Checkpoint(model=model, optimizer=model.optimizer).save(tmp_path / "run")
        tf.train.Checkpoint(model=other, optimizer=other.optimizer).restore(saved)
    after = coordinates_of(other.trainable_variables[0]).to_arrays()
    for name, value in coordinates_of(model.trainable_variables[0]).to_arrays().items():
        np.testing.assert_array_equal(after[name], value)
    assert not np.allclose(before["left"], after["left"])
    if road == "weights":
        expected = runs.fit(built(make(), plan, replay=True), plan.batches(*small_data()))
        updates = runs.fit(other, plan.batches(*small_data()), epochs=2)
        np.testing.assert_allclose(updates, expected[9:], atol=1e-6)


@pytest.mark.parametrize(
    "make_other",
    [
        lambda: small_model(3, 4),
        lambda: small_model(2, 4, power_iterations=2),
        lambda: small_model(2, 4, warmup_steps=1),
        lambda: small_model(2, 4, restart=True),
        small_model,
    ],
    ids=["rank", "power_iterations", "warmup", "restart", "no_carriers"],
)
def test_a_checkpoint_with_other_carriers_is_refused(make_other):
    plan = block_plan(3, 4)
    state = built(small_model(2, 4), plan).optimizer.run_state
    other = built(make_other(), plan).optimizer.run_state
    with pytest.raises(ValueError, match="another run"):
        other.from_arrays(state.to_arrays(), replay=False)


@pytest.mark.parametrize(
    "damage",
    [
        lambda a: a.pop("carrier_0_left"),
        lambda a: a.update(carrier_0_left=a["carrier_0_left"][:, :1]),
        lambda a: a.update(carrier_0_right=a["carrier_0_right"] * 2),
        lambda a: a.update(carrier_0_right=a["carrier_0_right"] * np.float32(1 + 4e-5)),
        lambda a: a.update(carrier_0_start=a["carrier_0_start"] * np.nan),
    ],
    ids=["missing", "rank", "not_orthonormal", "a_little_longer", "nan"],
)
def test_damaged_carriers_are_refused(damage):
    state = built(small_model(2, 4), block_plan(3, 4)).optimizer.run_state
    arrays = dict(state.to_arrays())
    damage(arrays)
    with pytest.raises(ValueError, match="carriers"):
        state.from_arrays(arrays, replay=False)


@pytest.mark.parametrize("refresh_every", [1, 3, 5])
def test_noise_across_a_refresh_is_refused(refresh_every):
    """A ring kept across a refresh is worse than DP-SGD; blocks must match."""
    model = small_model(2, refresh_every)
    optimizer = bandmf.BandMFOptimizer("sgd", block_plan(4, 4))
    with pytest.raises(ValueError, match="across a refresh"):
        optimizer.build(model.trainable_variables)
    toeplitz = bandmf.BandMFOptimizer("sgd", runs.make_plan(num_bands=2))
    with pytest.raises(ValueError, match="BlockDiagonalStrategy"):
        toeplitz.build(model.trainable_variables)


def test_sums_in_other_coordinates_are_refused():
    """Carriers put on after the optimizer was built."""
    plan = runs.make_plan(
        num_bands=1, sampling="fixed_order", max_participations=2, min_separation=12
    )
    model, carried = small_model(), small_model(2)
    bandmf.BandMFOptimizer("sgd", plan).build(carried.trainable_variables)
    optimizer = bandmf.BandMFOptimizer("sgd", plan)
    optimizer.build(model.trainable_variables)
    x, y = small_data()
    clipped = bandmf.clipped_gradients(carried, x, y, loss="mse")
    with pytest.raises(ValueError, match="coordinates"):
        optimizer.run_state.carriers.check_sums(clipped.sums)
    with pytest.raises(ValueError, match="variables they update"):
        optimizer.apply_clipped(clipped, model.trainable_variables)
