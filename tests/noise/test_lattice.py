"""Sums and noise on one lattice: what is released tells no more than the matrix mechanism does."""

import keras
import numpy as np
import pytest
import tensorflow as tf

import keras_bandmf as bandmf
from keras_bandmf.noise import CorrelatedNoise, finite, lattice
from keras_bandmf.strategies import BlockDiagonalStrategy, ToeplitzStrategy
from tests import runs
from tests.noise.test_correlated import STRATEGIES, DenseBanded


def releases(noise, sums, options=None):
    """The integers released for given clipped sums, (n, d)."""
    function = noise.noisy_sums
    if options is not None:
        function = tf.function(function, **options)
    rows = []
    for step, total in enumerate(sums):
        # As float32 would round them, 64 bits of the integers are read from sum and difference.
        (found,) = function([tf.constant(total)], tf.constant(step), scale=1.0 / noise.step)
        rows.append(found.numpy())
    return np.array(rows)


def small_noise(strategy, exact=False, stddev=2.0**-22, size=300):
    """A noise whose integers are below 2^24, so that float32 holds them exactly."""
    return CorrelatedNoise(strategy, stddev, [(size,)], seed=3, exact=exact)


@pytest.mark.parametrize("options", [None, {}, {"jit_compile": True}], ids=str)
@pytest.mark.parametrize("name", ["identity", "toeplitz", "raw_toeplitz", "banded"])
def test_released_integers_are_sum_plus_ring_exactly(name, options, monkeypatch):
    """For any sums: whole numbers, which differ from those without sums by the rounded sums."""
    monkeypatch.setattr(lattice, "STEP_BITS", 12)
    strategy = STRATEGIES[name]()
    rng = np.random.default_rng(1)
    sums = (rng.normal(size=(24, 300)) * 2.0**-22).astype(np.float32)
    noise, bare = small_noise(strategy), small_noise(strategy)
    found = releases(noise, sums, options)
    alone = releases(bare, np.zeros_like(sums))
    np.testing.assert_array_equal(found, np.rint(found))
    assert np.abs(found).max() < 2**24
    rounded = np.rint(sums.astype(np.float64) / noise.step)
    np.testing.assert_array_equal(found - alone, rounded)
    if noise.num_slots:
        slots = np.arange(24 - noise.num_slots, 24)
        np.testing.assert_array_equal(noise.get_ring()[slots % noise.num_slots], alone[slots])


@pytest.mark.parametrize("name", ["toeplitz", "banded"])
def test_releases_are_a_function_of_the_mechanism_and_of_earlier_releases(name):
    """w_i = rint(a (z + C G)_i - sum c w_{i-k}): the ring, without G, gives the same integers.

    Run in NumPy from y = C G + z and the releases alone, G known only through y.
    """
    strategy = STRATEGIES[name]()
    noise = CorrelatedNoise(strategy, 1.0, [(300,)], seed=3)
    table = lattice.recurrence(strategy)
    rng = np.random.default_rng(1)
    steps = np.rint(rng.normal(size=(24, 300)) * 2**20)
    key = noise._key.read_value()
    past, z = [], []
    from keras_bandmf.noise import normals

    for step in range(24):
        pair = normals.standard_normals(key, tf.constant(step, tf.int64), 0, 1)
        z.append(np.stack(pair, axis=-1).ravel()[:300] / noise.step)
    y = np.array(z)
    matrix = strategy.materialize()
    y += matrix @ steps
    for step in range(24):
        row = table[max(0, step - (24 - len(table)))]
        value = row[0] * y[step]
        for lag in range(1, min(step, strategy.num_bands - 1) + 1):
            value = value - row[lag] * past[step - lag]
        past.append(np.rint(value))
    noise_rows = []
    for total in steps:
        noise.noisy_sums([tf.constant(total * noise.step)], noise.position)
        slot = (noise.position - 1) % noise.num_slots
        noise_rows.append(noise.get_ring()[slot] + total)
    # Rounding in float64 may differ at a tie, once in a million values.
    assert np.mean(np.array(noise_rows) != np.array(past)) < 1e-3


def release_of(with_example, seed, scale=0.3):
    """One step of a real `fit` from zero weights; the example's gradient is on no grid of noise."""
    plan = runs.make_plan(num_bands=1, noise_multiplier=1.0)
    model = runs.noise_model(2000)
    model.compile(
        bandmf.BandMFOptimizer(keras.optimizers.SGD(1.0), plan, l2_norm_clip=1.0, seed=seed),
        loss=lambda y, p: tf.reduce_sum(p, axis=-1) * scale / 60.0 * y,
    )
    x = np.zeros((96, 2), np.float32)
    if with_example:
        x[:] = 0.7153981
    recorder = runs.WeightsOfEachStep()
    model.fit(plan.batches(x, np.ones(96, np.float32)), epochs=1, verbose=0, callbacks=[recorder])
    return recorder.weights[0], model.optimizer


def test_which_floats_are_released_tells_nothing():
    """Mironov's attack: every released weight is a lattice point, with the example and without.

    Floats `fl(z * stddev)` are not: there the share of values on a fixed grid told the two apart
    twelve times of twelve.
    """
    for with_example in (False, True):
        weights, optimizer = release_of(with_example, seed=5)
        noise = optimizer.run_state.noise
        integers = weights.astype(np.float64) * 8 / noise.step
        # float32 keeps 24 bits of them: the rest are the zeros of the last cast.
        kept = np.ldexp(1.0, np.maximum(np.frexp(integers)[1] - 24, 0))
        np.testing.assert_array_equal(integers / kept, np.rint(integers / kept))
        small = np.abs(integers) < 2**24
        assert small.mean() > 0.5
        odd = np.mod(integers[small], 2) == 1
        assert abs(odd.mean() - 0.5) < 4.0 * 0.5 / np.sqrt(odd.size)


def test_any_strategy_keeps_to_the_lattice_across_blocks():
    strategy = BlockDiagonalStrategy.optimize(12, 3, 4)
    noise = CorrelatedNoise(strategy, 1.0, [(500,)], seed=2)
    rows = np.array([np.asarray(noise.next()[0], np.float64) for _ in range(12)])
    bare = CorrelatedNoise(ToeplitzStrategy([1.0], 12), 1.0, [(500,)], seed=2)
    z = np.array([np.asarray(bare.next()[0], np.float64) for _ in range(12)])
    np.testing.assert_allclose(strategy.materialize() @ rows, z, atol=3e-6)


@pytest.mark.parametrize("name", ["toeplitz", "banded", "raw_toeplitz", "as_many_bands_as_steps"])
def test_largest_row_norm_is_that_of_the_inverse(name):
    strategy = STRATEGIES[name]()
    inverse = np.linalg.inv(strategy.materialize())
    found = lattice.largest_row_norm(strategy)
    exact = np.linalg.norm(inverse, axis=1).max()
    assert exact * (1 - 1e-9) <= found <= exact * 2.0


def test_the_recurrence_is_the_inverse():
    for make in (*STRATEGIES.values(), lambda: DenseBanded(10, 10)):
        strategy = make()
        table, steps = lattice.recurrence(strategy), strategy.num_steps
        inverse = np.zeros((steps, steps))
        for step in range(steps):
            row = table[max(0, step - (steps - len(table)))]
            inverse[step, step] = row[0]
            for lag in range(1, min(step, strategy.num_bands - 1) + 1):
                inverse[step] -= row[lag] * inverse[step - lag]
        np.testing.assert_allclose(inverse @ strategy.materialize(), np.eye(steps), atol=1e-12)


def test_a_strategy_whose_noise_grows_gets_a_coarser_lattice_or_is_refused():
    growing = ToeplitzStrategy([1.0, 1.0], 10_000, column_normalize=False)
    norm = lattice.largest_row_norm(growing)
    assert norm == pytest.approx(100.0 * np.sqrt(2.0))  # coefficients of norm 1
    assert 2.0 ** (31 + lattice.step_exponent(1.0, norm)) >= 12.5 * norm
    with pytest.raises(ValueError, match="stable"):
        lattice.step_exponent(1.0, lattice.largest_row_norm(ToeplitzStrategy([1.0, 1.5], 500)))


@pytest.mark.parametrize("stddev", [1e-30, 1e-25, 1e28, 1e38])
def test_noise_that_float32_cannot_hold_is_refused(stddev):
    with pytest.raises(ValueError, match="Received"):
        CorrelatedNoise(ToeplitzStrategy([1.0], 4), stddev, [(3,)])


def test_the_charge_covers_the_lattice_the_noise_takes():
    """At the edge of a power of two, too."""
    strategy = ToeplitzStrategy([1.0, 0.5], 24)
    for unit in (0.9, 1.0 - 1e-7, 1.0, 1.0 + 1e-7, 3.0):
        charged = lattice.charged_norm(1.0, strategy, unit, 10**8, 1)
        step = CorrelatedNoise(strategy, unit * charged, [(3,)]).step
        assert charged >= 1.0 + 10**4 * step
        sums = lattice.largest_batch(1) * lattice.FLOAT32_ROUNDING
        assert charged <= 1.0 + sums + 10**4 * step * 1.1
    assert lattice.charged_norm(1.0, strategy, 0.0, 10, 1) == 1.0
    with pytest.raises(ValueError, match="coarse"):
        lattice.charged_norm(1.0, strategy, 1e4, 10**9, 1)


def test_the_tail_is_charged_to_delta():
    assert finite.tail_total_variation(2.0**40) == pytest.approx(2.0**-48)
    finite.check_tail(1e11, 1e-5)
    with pytest.raises(ValueError, match="Received: delta=1e-15"):
        finite.check_tail(1e12, 1e-15)


def test_a_run_whose_delta_cannot_pay_for_the_tail_is_refused():
    plan = runs.make_plan(delta=1e-25)
    model = runs.noise_model()
    optimizer = bandmf.BandMFOptimizer("sgd", plan)
    with pytest.raises(ValueError, match="tails"):
        optimizer.build(model.trainable_variables)
