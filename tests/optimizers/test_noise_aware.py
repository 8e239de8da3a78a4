"""NoiseAwareAdam: its arithmetic, the noise it is told, and its place in a private run."""

import functools

import keras
import numpy as np
import pytest
import scipy.stats
import tensorflow as tf

import keras_bandmf as bandmf
from keras_bandmf._keras_internals import adam_moments
from tests import runs
from tests.training import test_resume as resume

STEPS = 12


class Told(bandmf.NoiseAwareAdam):
    """Remembers what it was told."""

    def set_noise(self, variances):
        """Keeps the variances."""
        super().set_noise(variances)
        self.variances = variances


def reference(gradients, variances, rates, start, floor, decay=0.0, beta_1=0.9, beta_2=0.999):
    """The weights of each step, float64: averages as weighted sums, corrected for their start."""
    weights, found = np.array(start, np.float64), []
    for t in range(1, len(gradients) + 1):
        ages = np.arange(t)[::-1]
        first = (1 - beta_1) * np.tensordot(beta_1**ages, gradients[:t], 1) / (1 - beta_1**t)
        shares = (1 - beta_2) * beta_2**ages / (1 - beta_2**t)
        phi = shares @ variances[:t]
        second = np.tensordot(shares, np.square(gradients[:t]), 1)
        divisor = np.sqrt(np.maximum(second - phi, floor * phi))
        weights = weights * (1 - decay * rates[t - 1]) - rates[t - 1] * first / divisor
        found.append(weights)
    return np.array(found)


def stepper(optimizer, variable, way):
    """Applies a gradient eagerly, in a graph, or in a program of XLA."""

    def step(gradient):
        optimizer.apply([gradient], [variable])

    if way == "eager":
        return step
    return tf.function(step, jit_compile=way == "xla", input_signature=[tf.TensorSpec((50,))])


@pytest.mark.parametrize("way", ["eager", "graph", "xla"])
@pytest.mark.parametrize("floor", [0.02, 0.5])
def test_steps_are_those_of_an_independent_adam(way, floor):
    """With variances that change, a schedule and weight decay."""
    random = np.random.default_rng(0)
    variances = random.uniform(0.5, 2.0, STEPS) ** 2
    gradients = random.normal(size=(STEPS, 50)) * np.sqrt(variances)[:, None]
    gradients = (gradients + np.linspace(0, 2, 50)).astype(np.float32)
    schedule = keras.optimizers.schedules.InverseTimeDecay(0.1, 1, 0.5)
    rates = 0.1 / (1 + 0.5 * np.arange(STEPS))
    optimizer = bandmf.NoiseAwareAdam(
        schedule, beta_2=0.9, variance_floor=floor, weight_decay=0.3, epsilon=0.0
    )
    variable = keras.Variable(np.ones(50, np.float32))
    optimizer.build([variable])
    optimizer.set_noise(variances)
    step, found = stepper(optimizer, variable, way), []
    for gradient in gradients:
        step(tf.constant(gradient))
        found.append(variable.numpy())
    expected = reference(gradients, variances, rates, np.ones(50), floor, 0.3, beta_2=0.9)
    np.testing.assert_allclose(found, expected, rtol=2e-4, atol=2e-5)
    # Both sides of the maximum took part.
    wide = reference(gradients, variances, rates, np.ones(50), 1e9, 0.3, beta_2=0.9)
    assert not np.allclose(expected, wide, rtol=1e-2)
    untouched = reference(gradients, variances, rates, np.ones(50), 1e-9, 0.3, beta_2=0.9)
    same = np.isclose(expected[-1], untouched[-1], rtol=1e-9)
    assert same.any() and not same.all()


def test_without_noise_it_is_adam_to_the_bit():
    random = np.random.default_rng(0)
    pairs = []
    for kind in (keras.optimizers.Adam, bandmf.NoiseAwareAdam):
        optimizer, variable = kind(0.1), keras.Variable(np.ones(50, np.float32))
        optimizer.build([variable])
        pairs.append((optimizer, variable))
    pairs[1][0].set_noise(np.zeros(STEPS))
    for _ in range(STEPS):
        gradient = tf.constant(random.normal(size=50), tf.float32)
        for optimizer, variable in pairs:
            optimizer.apply([gradient], [variable])
    np.testing.assert_array_equal(pairs[0][1].numpy(), pairs[1][1].numpy())


STRATEGIES = {
    "toeplitz": {},
    "identity": {"num_bands": 1},
    "banded": {"strategy": "banded"},
    "inverse": {
        "num_bands": None,
        "strategy": bandmf.strategies.BandedInverseStrategy([1.0, -0.5], 24),
        "sampling": "fixed_order",
    },
}
SETTINGS = {
    "flat": {},
    "per layer": {"clipping": "per_layer"},
    "automatic": {"clipping": "automatic"},
    "exact": {"noise": "exact"},
    "clip": {"l2_norm_clip": 0.25},
}


@pytest.mark.parametrize(
    ("strategy", "setting"),
    [(name, "flat") for name in STRATEGIES] + [("toeplitz", name) for name in SETTINGS],
)
def test_it_is_told_the_variance_of_the_noise_that_is_drawn(strategy, setting):
    plan = runs.make_plan(**STRATEGIES[strategy])
    inner = Told(0.1)
    optimizer = bandmf.BandMFOptimizer(inner, plan, seed=1, **SETTINGS[setting])
    model = runs.noise_model()
    optimizer.build(model.trainable_variables)
    inverse = np.linalg.inv(plan.strategy.materialize())
    scale = optimizer.run_state.noise.stddev / 8
    np.testing.assert_allclose(inner.variances, scale**2 * np.sum(inverse**2, axis=1), rtol=1e-9)
    # The rows themselves: a mean of 2,000 squares is within 20 % but with probability 1e-9.
    for variance in inner.variances[:5]:
        (row,) = optimizer.run_state.noise.next()
        assert np.mean(np.square(row / 8)) == pytest.approx(variance, rel=0.2)


def test_the_corrected_second_moment_of_constant_gradients_is_their_square():
    """Mean over 2,000 coordinates at 24 steps of correlated noise; false-alarm rate 1e-6."""
    plan = runs.make_plan(
        sampling="fixed_order", max_participations=2, min_separation=12, noise_multiplier=0.3
    )
    size = 2000
    model = keras.Sequential([keras.Input((size,)), keras.layers.Dense(1, use_bias=False)])
    inner = Told(1e-3)
    optimizer = bandmf.BandMFOptimizer(inner, plan, 1.0, seed=5)
    (kernel,) = model.trainable_variables
    ones = np.ones((8, size), np.float32)
    for _ in range(plan.num_steps):
        clipped = bandmf.clipped_gradients(
            model, ones, np.zeros(8), l2_norm_clip=1.0, loss=runs.prediction_loss
        )
        optimizer.apply_clipped(clipped, [kernel])
    gradient = 1 / np.sqrt(size)  # eight clipped examples of equal coordinates, over eight
    n = plan.num_steps
    shares = 0.999 ** np.arange(n)[::-1]
    shares /= shares.sum()
    _, second = adam_moments(inner, kernel)
    found = np.mean(second.numpy(), dtype=np.float64) / (1 - 0.999**n)
    inverse = np.linalg.inv(plan.strategy.materialize())
    covariance = inverse @ inverse.T * (optimizer.run_state.noise.stddev / 8) ** 2
    variance = 2 * shares @ covariance**2 @ shares + 4 * gradient**2 * shares @ covariance @ shares
    error = np.sqrt(variance / size)
    quantile = scipy.stats.norm.isf(5e-7)
    assert abs(found - shares @ inner.variances - gradient**2) < quantile * error
    # The test can fail: noise of the same deviation without correlation has another variance.
    independent = (optimizer.run_state.noise.stddev / 8) ** 2
    assert abs(found - independent - gradient**2) > 10 * quantile * error


def inner_optimizer(use_ema=True):
    """With all that goes together with it."""
    schedule = keras.optimizers.schedules.CosineDecay(0.01, 24)
    return bandmf.NoiseAwareAdam(schedule, beta_2=0.95, weight_decay=0.01, use_ema=use_ema)


def trained(replicas=1, make_inner=inner_optimizer, **options):
    """The weights after two epochs."""
    plan = runs.make_plan()

    def make():
        model, data = bandmf.privatize(runs.regularized_model(100)), runs.regularized_data()
        runs.compiled(model, plan, inner=make_inner(), loss="mse", **options)
        return model, data

    model, data = runs.in_scope(replicas, make)
    model.fit(plan.batches(*data), epochs=2, verbose=0)
    return [variable.numpy() for variable in model.trainable_variables]


@functools.cache
def trained_in_a_graph():
    """As `fit` runs by itself."""
    return trained()


@pytest.mark.parametrize(
    ("replicas", "options"),
    [
        pytest.param(1, {"run_eagerly": True}, marks=pytest.mark.slow),
        (1, {"jit_compile": True}),
        (2, {}),
    ],
    ids=["eager", "xla", "two replicas"],
)
def test_every_way_to_train_gives_the_same_weights(replicas, options):
    """Two replicas each apply half of the noisy gradient: its variance is that of the sum."""
    expected = trained_in_a_graph()
    for first, second in zip(expected, trained(replicas, **options), strict=True):
        np.testing.assert_allclose(second, first, rtol=1e-3, atol=2e-4)
    if not options:
        plain = trained(make_inner=functools.partial(keras.optimizers.Adam, 0.01))
        assert np.abs(plain[0] - expected[0]).max() > 0.01


def test_a_run_in_mixed_bfloat16_has_its_moments_in_float32():
    keras.config.set_dtype_policy("mixed_bfloat16")
    try:
        weights = trained()
    finally:
        keras.config.set_dtype_policy("float32")
    assert all(value.dtype == np.float32 and np.isfinite(value).all() for value in weights)


@pytest.mark.parametrize(
    "road",
    [
        pytest.param(resume.through_weights, marks=pytest.mark.slow),
        pytest.param(resume.through_checkpoint, marks=pytest.mark.slow),
        resume.through_keras_file,
    ],
)
def test_a_run_that_is_replayed_goes_on_to_the_bit(road, tmp_path):
    """The averaged variances are saved nowhere: they follow from the plan."""
    plan = runs.make_plan()

    def new():
        model, data = bandmf.privatize(runs.regularized_model(100)), runs.regularized_data()
        inner = inner_optimizer(use_ema=False)  # which changes the weights where `fit` ends
        runs.compiled(model, plan, inner=inner, loss="mse", replay=True)
        model.optimizer.build(model.trainable_variables)
        return model, data

    whole, data = new()
    whole.fit(plan.batches(*data), epochs=2, verbose=0)
    first, _ = new()
    first.fit(plan.batches(*data), epochs=1, steps_per_epoch=9, verbose=0)
    second = road(first, new()[0], tmp_path)
    assert isinstance(second.optimizer.inner_optimizer, bandmf.NoiseAwareAdam)
    second.fit(plan.batches(*data), epochs=2, verbose=0)
    assert second.optimizer.steps_done == plan.num_steps
    for expected, found in zip(whole.weights, second.weights, strict=True):
        np.testing.assert_array_equal(found.numpy(), expected.numpy())


def test_a_plan_that_fit_makes_is_told_then():
    model, data = bandmf.privatize(runs.regularized_model(100)), runs.regularized_data()
    inner = Told(0.01)
    optimizer = bandmf.BandMFOptimizer(inner, epsilon=4.0, delta=1e-5, num_bands=3, seed=3)
    model.compile(optimizer, loss="mse")
    optimizer.build(model.trainable_variables)
    assert not hasattr(inner, "variances")
    model.fit(*data, batch_size=8, epochs=1, verbose=0)
    assert len(inner.variances) == optimizer.plan.num_steps == 12


@pytest.mark.parametrize("jit_compile", [False, True])
def test_a_step_beyond_the_plan_is_nan(jit_compile):
    """Rule 8, with a table that ends with the plan."""
    plan = runs.make_plan(
        num_steps=4, num_bands=2, sampling="fixed_order", max_participations=1, min_separation=4
    )
    model = keras.Sequential([keras.Input((3,)), keras.layers.Dense(1)])
    optimizer = bandmf.BandMFOptimizer(bandmf.NoiseAwareAdam(), plan, seed=1)
    optimizer.build(model.trainable_variables)
    x, y = np.ones((8, 3), np.float32), np.zeros((8, 1), np.float32)

    @tf.function(jit_compile=jit_compile)
    def step():
        clipped = bandmf.clipped_gradients(model, x, y, l2_norm_clip=1.0, loss="mse")
        optimizer.apply_clipped(clipped, model.trainable_variables)

    for _ in range(4):
        step()
    assert all(np.isfinite(variable.numpy()).all() for variable in model.trainable_variables)
    step()
    assert all(np.isnan(variable.numpy()).all() for variable in model.trainable_variables)


def test_the_config_comes_back_without_the_noise():
    inner = bandmf.NoiseAwareAdam(
        keras.optimizers.schedules.CosineDecay(0.1, 10),
        beta_1=0.8,
        beta_2=0.99,
        epsilon=1e-6,
        variance_floor=0.25,
        weight_decay=0.1,
        use_ema=True,
        name="mine",
    )
    optimizer = bandmf.BandMFOptimizer(inner, runs.make_plan())
    optimizer.build(runs.noise_model().trainable_variables)
    config = keras.saving.serialize_keras_object(optimizer)
    other = keras.saving.deserialize_keras_object(config)
    assert keras.saving.serialize_keras_object(other) == config
    found = other.inner_optimizer
    assert type(found) is bandmf.NoiseAwareAdam
    settings = (found.beta_1, found.beta_2, found.epsilon, found.variance_floor, found.name)
    assert settings == (0.8, 0.99, 1e-6, 0.25, "mine")


@pytest.mark.parametrize(
    ("argument", "value"),
    [
        ("variance_floor", 0.0),
        ("variance_floor", np.nan),
        ("variance_floor", "small"),
        ("beta_1", 1.0),
        ("beta_2", 1.0),
        ("beta_2", -0.1),
        ("epsilon", -1e-7),
        ("amsgrad", True),
    ],
)
def test_bad_arguments_are_refused(argument, value):
    with pytest.raises((TypeError, ValueError), match=f"{argument}.*Received: {argument}="):
        bandmf.NoiseAwareAdam(**{argument: value})


@pytest.mark.parametrize("variances", [[], [[1.0]], [1.0, np.inf], [np.nan], [1.0, -1.0]])
def test_bad_variances_are_refused(variances):
    with pytest.raises(ValueError, match="variances"):
        bandmf.NoiseAwareAdam().set_noise(variances)


def test_alone_it_does_not_know_the_noise():
    model = keras.Sequential([keras.Input((3,)), keras.layers.Dense(1)])
    model.compile(bandmf.NoiseAwareAdam(), loss="mse")
    with pytest.raises(ValueError, match=r"BandMFOptimizer\(NoiseAwareAdam"):
        model.fit(np.ones((4, 3)), np.ones((4, 1)), verbose=0)


def test_variables_in_16_bits_are_refused():
    layer = keras.layers.Dense(1, dtype="bfloat16")
    layer.build((None, 3))
    optimizer = bandmf.BandMFOptimizer(bandmf.NoiseAwareAdam(), runs.make_plan())
    with pytest.raises(ValueError, match="mixed_bfloat16"):
        optimizer.build(layer.trainable_variables)


def test_gradients_that_are_rebuilt_from_carriers_are_refused():
    model, data = bandmf.privatize(runs.regularized_model(100)), runs.regularized_data()
    bandmf.enable_rgp(model, 2, refresh_every=1)
    plan = runs.make_plan(num_bands=1)
    runs.compiled(model, plan, inner=bandmf.NoiseAwareAdam(), loss="mse")
    with pytest.raises(ValueError, match="NoiseAwareAdam needs.*merge_rgp"):
        model.fit(plan.batches(*data), epochs=1, verbose=0)
    assert not model.optimizer.built
