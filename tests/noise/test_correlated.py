"""The noise is `C^-1 Z`: against dense NumPy, in every execution mode and on two replicas."""

import numpy as np
import pytest
import scipy.stats
import tensorflow as tf

from keras_bandmf import _distribution
from keras_bandmf.noise import CorrelatedNoise, normals
from keras_bandmf.strategies import ToeplitzStrategy
from tests import runs


class DenseBanded:
    """A banded strategy given by its matrix, as a general table of n rows."""

    def __init__(self, num_steps, num_bands, seed=0):
        rng = np.random.default_rng(seed)
        self.num_steps, self.num_bands = num_steps, num_bands
        self.matrix = np.zeros((num_steps, num_steps))
        for lag in range(num_bands):
            values = rng.uniform(0.1, 0.4, num_steps - lag) + (lag == 0)
            self.matrix += np.diag(values, -lag)

    def materialize(self):
        return self.matrix

    def noise_rows(self):
        rows = np.zeros((self.num_steps, self.num_bands))
        for i in range(self.num_steps):
            for lag in range(min(i, self.num_bands - 1) + 1):
                rows[i, lag] = self.matrix[i, i - lag]
        return rows

    def tail_scale(self):
        return np.zeros(0)


STRATEGIES = {
    "identity": lambda: ToeplitzStrategy([1.0], 24),
    "two_bands": lambda: ToeplitzStrategy([1.0, 0.5], 24),
    "toeplitz": lambda: ToeplitzStrategy([1.0, 0.6, 0.4, 0.3, 0.2], 24),
    "raw_toeplitz": lambda: ToeplitzStrategy([1.0, 0.6, 0.4], 24, column_normalize=False),
    "as_many_bands_as_steps": lambda: ToeplitzStrategy(0.7 ** np.arange(24), 24),
    "banded": lambda: DenseBanded(24, 4),
    "diagonal": lambda: DenseBanded(24, 1),
}
SHAPES = [(40, 30), (7,), ()]


def whole_stream(noise, step_of=None):
    """Returns rows as an (n, d) float64 array."""
    rows = []
    for _ in range(noise.num_steps):
        parts = noise.next() if step_of is None else step_of()
        rows.append(np.concatenate([np.ravel(part) for part in parts]))
    return np.array(rows, np.float64)


def dense_reference(strategy, stddev, seed):
    """`C^-1 Z` by a dense solve in float64 over the same `Z`."""
    key = tf.constant(normals.key_from_seed(seed).view(np.int64))
    size = sum(int(np.prod(shape)) for shape in SHAPES)
    z = [
        np.stack(normals.standard_normals(key, i, 0, 2), axis=-1).ravel()[:size]
        for i in range(strategy.num_steps)
    ]
    return np.linalg.solve(strategy.materialize(), stddev * np.array(z, np.float64))


@pytest.mark.parametrize("name", STRATEGIES)
def test_rows_equal_a_dense_solve(name):
    strategy = STRATEGIES[name]()
    rows = whole_stream(CorrelatedNoise(strategy, 1.5, SHAPES, seed=7))
    np.testing.assert_allclose(rows, dense_reference(strategy, 1.5, 7), atol=2e-6)


@pytest.mark.parametrize("options", [{}, {"jit_compile": True}])
@pytest.mark.parametrize("name", ["identity", "toeplitz", "banded"])
def test_compiled_streams_equal_the_dense_solve(name, options):
    strategy = STRATEGIES[name]()
    noise = CorrelatedNoise(strategy, 1.5, SHAPES, seed=7)
    rows = whole_stream(noise, tf.function(noise.next, autograph=False, **options))
    np.testing.assert_allclose(rows, dense_reference(strategy, 1.5, 7), atol=2e-6)


def test_covariance_is_that_of_the_mechanism():
    """Whitened rows are independent standard normals; chi-square, false-alarm rate 1e-4."""
    strategy = STRATEGIES["toeplitz"]()
    rows = whole_stream(CorrelatedNoise(strategy, 2.0, SHAPES, seed=11))
    white = strategy.materialize() @ rows / 2.0
    count = rows.shape[1]
    correlation = white @ white.T / count
    scores = np.sqrt(count) * (correlation - np.eye(24))[np.tril_indices(24)]
    variances = np.where(np.equal(*np.tril_indices(24)), 2.0, 1.0)
    statistic = (scores**2 / variances).sum()
    assert statistic < scipy.stats.chi2.isf(1e-4, scores.size)
    # The same statistic sees that unwhitened rows are correlated.
    raw = rows @ rows.T / count / 4.0
    raw_scores = np.sqrt(count) * (raw - np.eye(24))[np.tril_indices(24)]
    assert (raw_scores**2 / variances).sum() > scipy.stats.chi2.isf(1e-4, scores.size)


def replica_rows(strategy, shapes=SHAPES, num_rows=None):
    distribution = runs.mirrored()
    with distribution.scope():
        noise = CorrelatedNoise(strategy, 1.5, shapes, seed=7)

    def replica_share(step):
        context = tf.distribute.get_replica_context()
        replica = int(tf.get_static_value(context.replica_id_in_sync_group))
        return noise.noisy_sums([tf.zeros(shape) for shape in shapes], step, replica)

    @tf.function(autograph=False)
    def step_of(step):
        per_replica = distribution.run(replica_share, (step,))
        return [distribution.experimental_local_results(part)[0] for part in per_replica]

    rows = []
    for step in range(num_rows or strategy.num_steps):
        parts = step_of(tf.constant(step, tf.int64))
        rows.append(np.concatenate([np.ravel(part) for part in parts]))
    return np.array(rows), noise


@pytest.mark.parametrize("name", ["identity", "toeplitz", "banded"])
def test_two_replicas_make_the_same_stream_from_half_the_ring_each(name):
    strategy = STRATEGIES[name]()
    shared, noise = replica_rows(strategy)
    single = CorrelatedNoise(strategy, 1.5, SHAPES, seed=7)
    np.testing.assert_array_equal(shared, whole_stream(single).astype(np.float32))
    if single.state_bytes:
        assert noise.state_bytes == single.state_bytes / 2
        np.testing.assert_array_equal(noise.get_ring(), single.get_ring())


@pytest.mark.parametrize("num_bands", [5, 20])
def test_long_rows_are_bit_equal_on_two_replicas(num_bands):
    """Long enough for XLA to divide its loops among threads, at other places on each replica."""
    strategy = ToeplitzStrategy(0.8 ** np.arange(num_bands), 100)
    shapes = [(701, 613), (999_983,)]
    shared, _ = replica_rows(strategy, shapes, num_rows=4)
    single = CorrelatedNoise(strategy, 1.5, shapes, seed=7)
    for row in shared:
        np.testing.assert_array_equal(row, np.concatenate([np.ravel(p) for p in single.next()]))


@pytest.mark.parametrize("stddev", [0.0, 1.0])
@pytest.mark.parametrize("replica", [0, 1])
def test_sums_that_one_replica_cannot_use_are_nan_on_all(replica, stddev):
    distribution = runs.mirrored()
    with distribution.scope():
        noise = CorrelatedNoise(STRATEGIES["toeplitz"](), stddev, SHAPES)

    @tf.function(autograph=False)
    def step(number):
        def own():
            index = _distribution.replica_id()
            sums = [tf.ones(shape) for shape in SHAPES]
            return noise.noisy_sums(sums, number, index, usable=tf.constant(index != replica))

        found = distribution.run(own)
        return [distribution.experimental_local_results(part) for part in found]

    for parts in step(tf.constant(0, tf.int64)):
        assert all(np.isnan(part.numpy()).all() for part in parts)


@pytest.mark.parametrize("replica", [0, 1])
def test_a_step_of_one_replica_alone_moves_the_position(replica):
    """An interrupted step: the row was given out to a part of the gradient."""
    distribution = runs.mirrored()
    with distribution.scope():
        noise = CorrelatedNoise(STRATEGIES["toeplitz"](), 1.0, SHAPES)
    distribution.experimental_local_results(noise._position)[replica].assign(1)
    assert noise.position == 1


def test_a_ring_saved_on_one_device_continues_on_two_replicas():
    strategy = STRATEGIES["toeplitz"]()
    _, shared = replica_rows(strategy)
    single = CorrelatedNoise(strategy, 1.5, SHAPES, seed=7)
    whole_stream(single)
    ring = single.get_ring()
    single.set_ring(np.zeros_like(ring))
    single.set_ring(shared.get_ring())
    np.testing.assert_array_equal(single.get_ring(), ring)


def test_key_and_ring_continue_a_stream_bit_for_bit():
    strategy = STRATEGIES["toeplitz"]()
    original = CorrelatedNoise(strategy, 1.0, SHAPES)
    expected = whole_stream(original)
    first = CorrelatedNoise(strategy, 1.0, SHAPES)
    first.set_key(original.get_key())
    head = [np.concatenate([np.ravel(p) for p in first.next()]) for _ in range(10)]
    second = CorrelatedNoise(strategy, 1.0, SHAPES)
    second.set_key(first.get_key())
    second.set_ring(first.get_ring())
    second.position = first.position
    tail = [np.concatenate([np.ravel(p) for p in second.next()]) for _ in range(10, 24)]
    np.testing.assert_array_equal(np.array(head + tail), expected.astype(np.float32))


def test_streams_without_a_seed_differ():
    strategy = STRATEGIES["toeplitz"]()
    first, second = (CorrelatedNoise(strategy, 1.0, [(50,)]).next()[0] for _ in range(2))
    assert np.abs(first.numpy() - second.numpy()).max() > 0.1


def test_no_noise_is_left_after_the_last_step():
    noise = CorrelatedNoise(STRATEGIES["toeplitz"](), 1.0, [(3,)], seed=1)
    whole_stream(noise)
    with pytest.raises(ValueError, match="24 rows"):
        noise.next()
    zeros = [tf.zeros(3)]
    assert np.isnan(noise.noisy_sums(zeros, tf.constant(24))[0].numpy()).all()
    noise.position = 30
    compiled = tf.function(noise.noisy_sums, jit_compile=True)
    assert np.isnan(compiled(zeros, tf.constant(30))[0].numpy()).all()


@pytest.mark.parametrize("options", [None, {}, {"jit_compile": True}])
@pytest.mark.parametrize("name", ["identity", "two_bands", "toeplitz", "as_many_bands_as_steps"])
def test_a_row_is_given_out_once_and_in_order(name, options):
    """The same noise on two gradients would cancel: any other row than the next one is NaN.

    It changes nothing: the rows after it are those of the stream.
    """
    noise = CorrelatedNoise(STRATEGIES[name](), 1.0, [(3,)], seed=1)
    expected = whole_stream(CorrelatedNoise(STRATEGIES[name](), 1.0, [(3,)], seed=1))

    def row_of(step):
        return noise.noisy_sums([tf.zeros(3)], step)

    share = row_of if options is None else tf.function(row_of, **options)
    for step in range(25):
        for wrong in (step + 1, step - 1, 0, 100, -1):
            if wrong != step:
                assert np.isnan(share(tf.constant(wrong))[0]).all()
        assert noise.position == step
        row = share(tf.constant(step))[0].numpy()
        if step < 24:
            np.testing.assert_allclose(row, expected[step], atol=1e-6)
        else:
            assert np.isnan(row).all()
    assert noise.position == 24


def test_a_shard_too_long_to_compile_is_refused():
    """XLA ends the process, without an error, where a loop is of 2**31 elements or more."""
    with pytest.raises(ValueError, match="replicas"):
        CorrelatedNoise(STRATEGIES["identity"](), 1.0, [(2**16, 2**15)])


@pytest.mark.parametrize("stddev", [-1.0, np.nan, np.inf, "1", None, [1.0]])
def test_bad_stddev_is_refused(stddev):
    with pytest.raises((TypeError, ValueError), match="stddev"):
        CorrelatedNoise(STRATEGIES["identity"](), stddev, [(3,)])


@pytest.mark.parametrize(
    "damage",
    [
        lambda ring: ring[:-1],
        lambda ring: ring[:, :-1],
        lambda ring: ring.astype(np.float16),
        lambda ring: ring.astype(np.float32),
        lambda ring: ring.astype(np.int64),
    ],
)
def test_a_foreign_or_damaged_ring_is_refused(damage):
    noise = CorrelatedNoise(STRATEGIES["toeplitz"](), 1.0, SHAPES, seed=1)
    with pytest.raises(ValueError, match="noise ring"):
        noise.set_ring(damage(noise.get_ring()))


def test_zero_stddev_is_no_noise():
    rows = whole_stream(CorrelatedNoise(STRATEGIES["toeplitz"](), 0.0, SHAPES, seed=1))
    assert not rows.any()
