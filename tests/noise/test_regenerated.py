"""Noise that is drawn again: the same tests as of the ring, and that it keeps nothing."""

import re

import numpy as np
import pytest
import scipy.signal
import scipy.stats
import tensorflow as tf

from keras_bandmf.noise import (
    CorrelatedNoise,
    NoiseTaps,
    RegeneratedNoise,
    lattice,
    normals,
    regenerated,
    taps,
)
from keras_bandmf.noise.regenerated import noise_of, refuse_exact
from keras_bandmf.strategies import BandedInverseStrategy, ToeplitzStrategy
from tests.noise.test_correlated import SHAPES, whole_stream
from tests.runs import mirrored

STEPS = 24
STRATEGIES = {
    "identity": lambda: BandedInverseStrategy([1.0], STEPS),
    "two_taps": lambda: BandedInverseStrategy([1.0, -0.9], STEPS),
    "root": lambda: BandedInverseStrategy.square_root(STEPS, 4),
    "optimized": lambda: BandedInverseStrategy.optimize(STEPS, 7, 2, 12),
    "as_many_taps_as_steps": lambda: BandedInverseStrategy.square_root(STEPS, STEPS),
}
MODES = {"eager": None, "graph": {}, "xla": {"jit_compile": True}}


def step_key(key, step):
    """The key of a row of Z, by its definition."""
    return normals.fold_key(key, f"step {step}").view(np.int64)


def independent_rows(keys, size):
    """Rows of Z of deviation 1, from their keys."""
    chunks = -(-size // normals.CHUNK)
    return np.array(
        [
            np.stack(normals.standard_normals(tf.constant(k), i, 0, chunks), -1).ravel()[:size]
            for i, k in enumerate(keys)
        ]
    )


def dense_reference(strategy, stddev, key, size=1208):
    z = independent_rows([step_key(key, i) for i in range(strategy.num_steps)], size)
    return np.linalg.solve(strategy.materialize(), stddev * z)


@pytest.mark.parametrize(
    "name,mode",
    [*((name, "eager") for name in STRATEGIES), ("optimized", "graph"), ("root", "xla")],
)
def test_rows_equal_a_dense_solve(name, mode):
    strategy, options = STRATEGIES[name](), MODES[mode]
    noise = RegeneratedNoise(strategy, 1.5, SHAPES, seed=7)
    step = None if options is None else tf.function(noise.next, autograph=False, **options)
    rows = whole_stream(noise, step)
    np.testing.assert_allclose(rows, dense_reference(strategy, 1.5, noise.get_key()), atol=2e-6)


@pytest.mark.parametrize("name", ["two_taps", "optimized"])
def test_covariance_is_that_of_the_mechanism(name):
    """Whitened rows are independent standard normals; chi-square, false-alarm rate 1e-4."""
    strategy = STRATEGIES[name]()
    rows = whole_stream(RegeneratedNoise(strategy, 2.0, SHAPES, seed=11))
    count, lower = rows.shape[1], np.tril_indices(STEPS)
    variances = np.where(np.equal(*lower), 2.0, 1.0)

    def statistic(white):
        scores = np.sqrt(count) * (white @ white.T / count - np.eye(STEPS))[lower]
        return (scores**2 / variances).sum()

    limit = scipy.stats.chi2.isf(1e-4, len(variances))
    assert statistic(strategy.materialize() @ rows / 2.0) < limit
    assert statistic(rows / 2.0) > limit


@pytest.mark.parametrize("name", ["root", "optimized"])
def test_rows_are_the_whole_numbers_of_the_proof(name):
    """floor((Z + rint(sum d Z)) / 2^16 + 1/2), in integers: half up, and nothing else is added."""
    size, strategy = 300_000, STRATEGIES[name]()
    noise = RegeneratedNoise(strategy, 1.5, [(size,)], seed=3)
    rows, z = [], []
    scale = strategy.noise_taps()[0] * 1.5 / noise.step * 2.0**taps.TAP_BITS
    ratios = strategy.inverse_coefficients
    ties, wrong = 0, 0
    for step in range(6):
        row = noise._row(tf.constant(step, tf.int64), 0)
        rows.append(row.numpy().view(np.int32)[:size])
        key = tf.constant(step_key(noise.get_key(), step))
        pair = normals.standard_normals(key, step, 0, -(-size // normals.CHUNK))
        z.append(np.rint(np.stack(pair, -1).ravel()[:size] * scale).astype(np.int64))
        past = sum(
            (ratios[k] * z[step - k] for k in range(1, min(step, len(ratios) - 1) + 1)),
            np.zeros(size),
        )
        value = z[step] + np.rint(past).astype(np.int64)
        tie = value % 2**taps.TAP_BITS == 2 ** (taps.TAP_BITS - 1)
        expected = (value + 2 ** (taps.TAP_BITS - 1)) >> taps.TAP_BITS
        # Fine sums may differ by rounding of float64, and then a whole number may, once in 2^15.
        differs = np.abs(expected - rows[-1])
        assert differs.max() <= 1 and differs.sum() <= 10
        ties, wrong = ties + tie.sum(), wrong + differs[tie].sum()
    # Half to even would differ at half of the ties.
    assert ties > 15 and wrong <= 2


@pytest.mark.parametrize("mode", MODES)
def test_released_integers_are_sum_plus_noise_exactly(mode, monkeypatch):
    monkeypatch.setattr(lattice, "STEP_BITS", 12)
    strategy, stddev, options = STRATEGIES["optimized"](), 2.0**-22, MODES[mode]
    sums = (np.random.default_rng(1).normal(size=(STEPS, 300)) * 2.0**-22).astype(np.float32)

    def releases(values):
        noise = RegeneratedNoise(strategy, stddev, [(300,)], seed=3)
        function = noise.noisy_sums
        if options is not None:
            function = tf.function(function, **options)
        rows = [
            function([tf.constant(v)], tf.constant(i), scale=1.0 / noise.step)[0].numpy()
            for i, v in enumerate(values)
        ]
        return np.array(rows), noise

    found, noise = releases(sums)
    alone, _ = releases(np.zeros_like(sums))
    np.testing.assert_array_equal(found, np.rint(found))
    assert np.abs(found).max() < 2**24
    rounded = np.rint(sums.astype(np.float64) / noise.step)
    np.testing.assert_array_equal(found - alone, rounded)


def replica_rows(strategy, shapes, num_rows):
    distribution = mirrored()
    with distribution.scope():
        noise = RegeneratedNoise(strategy, 1.5, shapes, seed=7)

    @tf.function(autograph=False)
    def step_of(step):
        def share():
            replica = tf.distribute.get_replica_context().replica_id_in_sync_group
            replica = int(tf.get_static_value(replica))
            return noise.noisy_sums([tf.zeros(shape) for shape in shapes], step, replica)

        found = distribution.run(share)
        return [distribution.experimental_local_results(part)[0] for part in found]

    rows = [step_of(tf.constant(step, tf.int64)) for step in range(num_rows)]
    return [np.concatenate([np.ravel(part) for part in parts]) for parts in rows], noise


@pytest.mark.parametrize(
    "shapes,num_rows", [(SHAPES, STEPS), ([(701, 613), (999_983,)], 4), ([(3,)], 3)]
)
def test_two_replicas_make_the_same_stream_from_half_of_it_each(shapes, num_rows):
    """Also of several blocks, which begin at other places on each replica."""
    strategy = STRATEGIES["optimized"]()
    shared, noise = replica_rows(strategy, shapes, num_rows)
    single = RegeneratedNoise(strategy, 1.5, shapes, seed=7)
    for row in shared:
        np.testing.assert_array_equal(row, np.concatenate([np.ravel(p) for p in single.next()]))
    np.testing.assert_array_equal(noise.get_ring(), single.get_ring())


@pytest.mark.parametrize("block", [1, 3, 8192])
def test_blocks_of_any_size_give_the_same_bits(monkeypatch, block):
    """A GPU draws larger ones than a processor."""
    shapes = [(9, 613), (4_983,)]
    strategy = STRATEGIES["optimized"]()
    expected = whole_stream(RegeneratedNoise(strategy, 1.5, shapes, seed=7))
    monkeypatch.setattr(regenerated, "_BLOCK", block)
    found = whole_stream(RegeneratedNoise(strategy, 1.5, shapes, seed=7))
    np.testing.assert_array_equal(found, expected)


def test_a_gpu_draws_larger_blocks():
    """Each block is launched by the processor: small ones took two to three times as long."""
    cpu = regenerated.largest_block("/job:localhost/replica:0/task:0/device:CPU:0")
    gpu = regenerated.largest_block("/job:localhost/replica:0/task:0/device:GPU:1")
    assert gpu > cpu == regenerated.largest_block("")


@pytest.mark.parametrize(
    "name,head",
    [("optimized", 3), ("optimized", 10), ("identity", 0), ("as_many_taps_as_steps", 9)],
)
def test_keys_continue_a_stream_bit_for_bit(name, head):
    strategy = STRATEGIES[name]()
    original = RegeneratedNoise(strategy, 1.0, SHAPES)
    expected = whole_stream(original)
    first = RegeneratedNoise(strategy, 1.0, SHAPES)
    first.set_key(original.get_key())
    rows = [np.concatenate([np.ravel(p) for p in first.next()]) for _ in range(head)]
    second = RegeneratedNoise(strategy, 1.0, SHAPES)
    second.set_ring(first.get_ring(), first.position)
    second.set_key(first.get_key())
    assert second.position == head
    rows += [np.concatenate([np.ravel(p) for p in second.next()]) for _ in range(head, STEPS)]
    np.testing.assert_array_equal(np.array(rows), expected.astype(np.float32))


def test_a_new_key_is_that_of_later_rows_of_z_only():
    """After a restore the noise is C^-1 Z still, with the earlier rows of Z."""
    strategy = STRATEGIES["optimized"]()
    first = RegeneratedNoise(strategy, 1.5, [(1000,)], seed=1)
    rows = [first.next()[0].numpy() for _ in range(10)]
    ring = first.get_ring()
    second = RegeneratedNoise(strategy, 1.5, [(1000,)], seed=2)
    second.set_ring(ring, 10)
    second.set_key(normals.key_from_seed(2))
    rows += [second.next()[0].numpy() for _ in range(10, STEPS)]
    keys = [step_key(normals.key_from_seed(1 if i < 10 else 2), i) for i in range(STEPS)]
    expected = np.linalg.solve(strategy.materialize(), 1.5 * independent_rows(keys, 1000))
    np.testing.assert_allclose(np.array(rows), expected, atol=2e-6)
    # Of the first key, a checkpoint has what draws the last p - 1 rows of Z and nothing else.
    np.testing.assert_array_equal(ring.view(np.int64), keys[4:10])


@pytest.mark.parametrize("name,mode", [("identity", "eager"), ("optimized", "xla")])
def test_a_row_is_given_out_once_and_in_order(name, mode):
    """The same noise on two gradients would cancel: any other row than the next one is NaN."""
    options = MODES[mode]
    noise = RegeneratedNoise(STRATEGIES[name](), 1.0, [(3,)], seed=1)
    expected = whole_stream(RegeneratedNoise(STRATEGIES[name](), 1.0, [(3,)], seed=1))

    def row_of(step):
        return noise.noisy_sums([tf.zeros(3)], step)

    share = row_of if options is None else tf.function(row_of, **options)
    for step in range(STEPS + 1):
        for wrong in (step + 1, step - 1, 0, 100, -1):
            if wrong != step:
                assert np.isnan(share(tf.constant(wrong))[0]).all()
        assert noise.position == step
        row = share(tf.constant(step))[0].numpy()
        if step < STEPS:
            np.testing.assert_allclose(row, expected[step], atol=1e-6)
        else:
            assert np.isnan(row).all()


def test_it_keeps_nothing_and_never_has_a_row_of_z_in_memory(monkeypatch):
    monkeypatch.setattr(regenerated, "_GPU_BLOCK", regenerated._BLOCK)
    size = 3_000_000
    noise = RegeneratedNoise(BandedInverseStrategy.square_root(100, 16), 1.0, [(size,)])
    assert noise.state_bytes == 0 and noise._ring is None
    text = noise._row.experimental_get_compiler_ir(tf.constant(0, tf.int64), 0)("optimized_hlo")
    lengths = [int(length) for length in re.findall(r"(?:f64|u64)\[(\d+)", text)]
    assert max(lengths) <= size / 20


def test_streams_without_a_seed_differ_and_zero_stddev_is_no_noise():
    strategy = STRATEGIES["optimized"]()
    first, second = (RegeneratedNoise(strategy, 1.0, [(50,)]).next()[0] for _ in range(2))
    assert np.abs(first.numpy() - second.numpy()).max() > 0.1
    assert not whole_stream(RegeneratedNoise(strategy, 0.0, SHAPES, seed=1)).any()


def test_the_shift_of_the_proof_is_within_its_bound():
    """Z' that gives the same view under G': found step by step, with the rounding of the code."""
    rng = np.random.default_rng(0)
    strategy = BandedInverseStrategy.square_root(200, 8)
    n, size, ratios = 200, 50, strategy.inverse_coefficients
    gradients = np.zeros((n, size))
    gradients[[3, 90]] = rng.normal(size=(2, size)) * 40.0
    gradients = np.rint(gradients)  # fine steps: so small that rounding matters
    whole, shifted = np.zeros((2, n, size))
    fresh = np.rint(rng.normal(size=(n, size)) * 2.0**20)
    for i in range(n):
        lags = range(1, min(i, len(ratios) - 1) + 1)
        # Draws that are not repeated to the bit, and differ for the neighbor.
        past, other = (
            sum((ratios[k] * (z[i - k] + rng.uniform(-2, 2, size)) for k in lags), np.zeros(size))
            for z in (whole, shifted)
        )
        whole[i] = fresh[i]
        shifted[i] = whole[i] + np.rint(past) + gradients[i] - np.rint(other)
    moved = shifted - whole
    matrix = np.linalg.inv(np.linalg.inv(strategy.materialize()) / strategy.noise_taps()[0])
    exact = matrix @ gradients
    extra = taps.rounding_steps(strategy) * 2.0**taps.TAP_BITS * np.sqrt(size)
    extra *= strategy.noise_taps()[0]
    assert np.linalg.norm(moved) <= np.linalg.norm(exact) + extra
    assert np.linalg.norm(moved) > 1.02 * np.linalg.norm(exact)


@pytest.mark.parametrize("name", STRATEGIES)
def test_what_rounding_costs(name):
    strategy = STRATEGIES[name]()
    matrix = strategy.materialize()
    relative = np.abs(strategy.inverse_coefficients[1:]).sum()
    error = 0.5 + relative * (2.0 + (strategy.num_inverse_bands + 1) / 64)
    # The norm of C is at most the sum of its first column.
    assert np.linalg.norm(matrix, 2) <= matrix[:, 0].sum() * (1 + 1e-12)
    expected = 2.0 * error * matrix[:, 0].sum() * np.sqrt(STEPS) / 2**16
    assert lattice.rounding_steps(strategy) == pytest.approx(expected, rel=1e-12)
    inverse = np.linalg.inv(matrix)
    norm = np.linalg.norm(inverse, axis=1).max()
    assert lattice.largest_row_norm(strategy) == pytest.approx(norm, rel=1e-12)


def test_the_charge_covers_the_lattice_and_the_rounding():
    strategy = BandedInverseStrategy.square_root(10**5, 64)
    moved = lattice.rounding_steps(strategy)
    assert moved > 0.1
    charged = lattice.charged_norm(1.0, strategy, 1.0, 10**8, 1)
    step = RegeneratedNoise(strategy, charged, [(3,)]).step
    assert charged >= 1.0 + (1.0 + moved) * 10**4 * step


class Taps:
    """Any taps."""

    def __init__(self, values, num_steps=10):
        self.values, self.num_steps = values, num_steps

    def noise_taps(self):
        return self.values


def test_taps_of_your_own():
    values = np.array([1.0, 0.5, -0.3])  # no strategy of the package has positive ones
    strategy = Taps(values)
    assert isinstance(strategy, NoiseTaps)
    noise = RegeneratedNoise(strategy, 1.0, [(500,)], seed=4)
    rows = whole_stream(noise)
    z = independent_rows([step_key(noise.get_key(), i) for i in range(10)], 500)
    np.testing.assert_allclose(rows, scipy.signal.lfilter(values, [1.0], z, axis=0), atol=2e-6)


@pytest.mark.parametrize(
    "values",
    [[], [[1.0]], [0.0, 1.0], [-1.0, 0.5], [1.0, np.nan], [np.inf], [1.0, -9.0, 9.0], 1.0],
)
def test_bad_taps_are_refused(values):
    with pytest.raises(ValueError, match="Received: noise_taps"):
        RegeneratedNoise(Taps(values), 1.0, [(3,)])


def test_more_steps_than_keys_are_refused():
    with pytest.raises(ValueError, match="1000000 steps. Received: num_steps=1000001"):
        RegeneratedNoise(Taps(np.ones(1), 10**6 + 1), 1.0, [(3,)])


def test_noise_that_grows_is_too_coarse():
    with pytest.raises(ValueError, match="coarse"):
        lattice.charged_norm(1.0, Taps(np.array([1.0, -2.0]), 5000), 1.0, 10, 1)


@pytest.mark.parametrize("stddev", [-1.0, np.nan, np.inf, "1", None, [1.0]])
def test_bad_stddev_is_refused(stddev):
    with pytest.raises((TypeError, ValueError), match="stddev"):
        RegeneratedNoise(STRATEGIES["identity"](), stddev, [(3,)])


@pytest.mark.parametrize(
    "damage",
    [
        lambda ring: ring[:-1],
        lambda ring: ring[:, :-1],
        lambda ring: ring.astype(np.int64),
        lambda ring: np.zeros((6, 1208), np.int32),
    ],
)
def test_a_foreign_or_damaged_ring_is_refused(damage):
    noise = RegeneratedNoise(STRATEGIES["optimized"](), 1.0, SHAPES, seed=1)
    with pytest.raises(ValueError, match="noise ring"):
        noise.set_ring(damage(noise.get_ring()), 5)
    assert noise.position == 0


def test_a_strategy_gets_its_noise():
    banded, inverse = ToeplitzStrategy([0.8, 0.6], 8), STRATEGIES["two_taps"]()
    assert type(noise_of(banded, 1.0, [(3,)])) is CorrelatedNoise
    assert noise_of(banded, 1.0, [(3,)], exact=True).exact
    assert type(noise_of(inverse, 1.0, [(3,)])) is RegeneratedNoise
    refuse_exact(banded)
    with pytest.raises(ValueError, match="Received: noise='exact'"):
        noise_of(inverse, 1.0, [(3,)], exact=True)
    with pytest.raises(NotImplementedError, match="noise_rows"):
        CorrelatedNoise(inverse, 1.0, [(3,)])
