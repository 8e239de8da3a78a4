"""The counter-based stream: normal, independent over steps, the same in parts as in one piece."""

import decimal
import math
import re

import numpy as np
import pytest
import scipy.stats
import tensorflow as tf
from numpy.polynomial import Polynomial

from keras_bandmf.noise import exact, normals

KEY = normals.key_from_seed(3)


def draw(step=0, first_chunk=0, num_chunks=64, key=KEY, jit_compile=True):
    function = normals.standard_normals
    if jit_compile is not None:
        function = tf.function(function, jit_compile=jit_compile, autograph=False)
    pairs = function(
        tf.constant(key.view(np.int64)), tf.constant(step, tf.int64), first_chunk, num_chunks
    )
    return np.stack(pairs, axis=-1).ravel()


def test_values_are_standard_normal():
    """Kolmogorov-Smirnov and moments; each part has a false-alarm rate of 1e-4."""
    values = draw(num_chunks=512).astype(np.float64)
    assert scipy.stats.kstest(values, "norm").pvalue > 1e-4
    limit = scipy.stats.norm.isf(0.5e-4)
    count = values.size
    assert abs(values.mean()) * np.sqrt(count) < limit
    assert abs((values**2).mean() - 1) * np.sqrt(count / 2) < limit
    assert abs((values**4).mean() - 3) * np.sqrt(count / 96) < limit


def test_both_halves_of_a_box_muller_pair_are_independent():
    """Correlation of cosine and sine halves and of their squares, false-alarm rate 1e-4 each."""
    pairs = draw(num_chunks=512).astype(np.float64).reshape(-1, 2)
    a, b = pairs.T
    limit = scipy.stats.norm.isf(0.5e-4) / np.sqrt(a.size)
    assert abs(np.corrcoef(a, b)[0, 1]) < limit
    assert abs(np.corrcoef(a**2, b**2)[0, 1]) < limit


def test_steps_and_keys_give_unrelated_rows():
    """Correlations of 2**16 values, false-alarm rate 1e-4 each."""
    base = draw(step=5)
    limit = scipy.stats.norm.isf(0.5e-4) / np.sqrt(base.size)
    other_key = KEY.copy()
    other_key[0] += 1
    offset_key = KEY.copy()
    offset_key[1] += 10**6
    for other in (draw(step=6), draw(step=5, key=other_key), draw(step=5, key=offset_key)):
        assert abs(np.corrcoef(base, other)[0, 1]) < limit


def test_no_piece_of_the_stream_is_repeated():
    """Steps that shared Philox blocks would shift against each other: lag 0 does not see it."""
    rows = np.stack([draw(step, num_chunks=8) for step in range(6)])
    neighbors = np.stack([rows[:, :-1], rows[:, 1:]], axis=-1).reshape(-1, 2)
    assert len(np.unique(neighbors, axis=0)) == len(neighbors)


def uniform_of(words):
    """U of the radius, exactly, as numerator over 2^89."""
    first, second, _, fourth = (int(word) for word in words)
    return 2 * ((first << 56) + (second << 24) + fourth % 2**24) + 1


def expected_pair(words):
    """Box-Muller of one counter's words in 60 digits."""
    _, _, third, fourth = (int(word) for word in words)
    radius = exact.root_of_log(uniform_of(words), 89)
    fine = (fourth >> 24) & 63
    signed = third - 2**31
    cosine, sine = exact.direction(2 * (signed * 2**6 + fine) + 1, 38)
    cosine *= -radius if fourth >> 30 & 1 else radius
    sine *= radius
    return (sine, cosine) if fourth >> 31 else (cosine, sine)


def hard_words(count=400):
    """Words at random, with U of every magnitude at both ends, and at the joints."""
    rng = np.random.default_rng(0)
    words = rng.integers(0, 2**32, (4, count), dtype=np.uint64)
    tiny = words[:, : count // 4]
    shift = np.arange(count // 4) * 87 // (count // 4)
    for index, places in enumerate(shift):
        value = (int(tiny[0, index]) << 56 | int(tiny[1, index]) << 24) >> int(places)
        tiny[0, index], tiny[1, index] = value >> 56, (value >> 24) % 2**32
        tiny[3, index] = (int(tiny[3, index]) >> 24 << 24) | value % 2**24
    flipped = tiny ^ np.uint64(2**32 - 1)
    root = int(math.sqrt(0.5) * 2**32)
    joints = np.tile(rng.integers(0, 2**32, (4, 1), dtype=np.uint64), 12)
    joints[0] = [
        0,
        1,
        2**31 - 1,
        2**31,
        root,
        root + 1,
        root - 1,
        root // 2,
        2**30,
        2**32 - 1,
        3,
        5,
    ]
    ends = np.array([[0] * 4, [2**32 - 1] * 4, [0, 0, 0, 1 << 31], [0, 0, 2**32 - 1, 3 << 30]])
    return np.concatenate([words, flipped, joints, ends.T.astype(np.uint64)], axis=1)


def compiled_pairs(words, series, jit_compile=True):
    compiled = tf.function(normals.box_muller, jit_compile=jit_compile, autograph=False)
    return np.stack(compiled(*[tf.constant(word) for word in words], series), axis=-1)


@pytest.mark.parametrize("jit_compile", [False, True])
@pytest.mark.parametrize(
    ("series", "bound"), [(normals.FAST, 2.0**-33), (normals.FINE, 2.0**-46)], ids=["fast", "fine"]
)
def test_box_muller_is_that_of_60_digits(jit_compile, series, bound):
    """Off by so little of the radius, from 1e-13 to 11.1 sigma: radius, angle, swap, sign."""
    words = hard_words()
    found = compiled_pairs(words, series, jit_compile)
    for pair, column in zip(found, words.T, strict=True):
        expected = expected_pair(column)
        radius = exact.root_of_log(uniform_of(column), 89)
        for value, ideal in zip(pair, expected, strict=True):
            assert abs(decimal.Decimal(float(value)) - ideal) < radius * decimal.Decimal(bound)
    assert np.hypot(*found.T).max() > 11.1
    assert np.hypot(*found.T).min() < 1e-12


def words_of(uniform, angle, swap=0):
    """Words of U = uniform / 2^88 and of an angle of 38 bits."""
    fourth = uniform % 2**24 + (angle % 64 << 24) + (swap << 31)
    words = [uniform >> 56, (uniform >> 24) % 2**32, angle >> 6, fourth]
    return [np.array([word], np.uint64) for word in words]


@pytest.mark.parametrize("series", [normals.FAST, normals.FINE], ids=["fast", "fine"])
def test_the_pieces_of_the_fast_functions_meet(series):
    """On both sides of a joint the values differ by what the arguments do, and 2^-36."""
    last = 2**38 - 1
    for ends in ((last, 0), (0, 0), (last, last)):
        # Angles within pi / 4 of the first axis end where those about the second one begin.
        below, above = (
            words_of(3 << 80, end, swap) for swap, end in zip((0, 1), ends, strict=True)
        )
        first, second = (compiled_pairs(words, series)[0] for words in (below, above))
        np.testing.assert_allclose(np.abs(first), np.abs(second), rtol=2.0**-36)
    for power in (1, 2, 3, 10, 40):
        uniform = math.isqrt(2 ** (177 - 2 * power))  # sqrt(2) * 2^(88 - power), just below it
        pairs = [compiled_pairs(words_of(uniform + more, 2**37), series)[0] for more in (-1, 2)]
        np.testing.assert_allclose(pairs[0], pairs[1], rtol=2.0**-36, atol=2.0**-36)


def test_the_fast_functions_change_the_density_little():
    """The determinant of their map, piece by piece, from the polynomials: within 2^-28 of one."""
    turn, odd, even = np.linspace(0.0, 0.5, 10_001), Polynomial([0, 1]), Polynomial([0, 0, 1])
    cosine = Polynomial(normals.FAST.cosine)(even)
    sine = odd * Polynomial(normals.FAST.sine)(even)
    angle = (cosine * sine.deriv() - sine * cosine.deriv())(turn) * 2 / np.pi
    assert np.abs(angle - 1).max() < 2.0**-28.4
    mantissa = np.linspace(np.sqrt(0.5), np.sqrt(2), 10_001)
    reciprocal = Polynomial(normals._RECIPROCAL)(Polynomial([1, 1]))
    for _ in range(normals.FAST.newton_steps):
        reciprocal = reciprocal + reciprocal * (1 - Polynomial([1, 1]) * reciprocal)
    ratio = Polynomial([-1, 1]) * reciprocal
    logarithm = odd * Polynomial(normals.FAST.logarithm)(even)
    energy = logarithm.deriv()(ratio(mantissa)) * ratio.deriv()(mantissa) * mantissa / -2
    assert np.abs(energy - 1).max() < 2.0**-30.5


@pytest.mark.parametrize("sigmas", [7, 8, 9, 10, 11])
def test_the_radius_goes_on_beyond_seven_sigma(sigmas):
    """Deterministic: U = exp(-r^2 / 2) gives the radius r; with 31 bits it ended at 6.66."""
    uniform = int(math.exp(-(sigmas**2) / 2) * 2.0**88)
    words = [uniform >> 56, (uniform >> 24) % 2**32, 2**31, uniform % 2**24]
    pair = normals.box_muller(*[tf.constant([word], tf.uint64) for word in words])
    assert np.hypot(*pair)[0] == pytest.approx(sigmas, rel=1e-2 if sigmas == 11 else 1e-4)


def tail_counts(num_rows, chunks):
    """How many of the normals are beyond each limit, and how many are expected."""
    limits = np.array([5.0, 5.5, 6.0, 6.5])

    @tf.function(jit_compile=True, autograph=False)
    def beyond(step):
        pair = normals.standard_normals(tf.constant(KEY.view(np.int64)), step, 0, chunks)
        sizes = [tf.abs(half) for half in pair]
        return tf.stack(
            [sum(tf.reduce_sum(tf.cast(s > limit, tf.int32)) for s in sizes) for limit in limits]
        )

    counts = sum(beyond(tf.constant(row, tf.int64)).numpy() for row in range(num_rows))
    return counts, num_rows * chunks * normals.CHUNK * 2 * scipy.stats.norm.sf(limits)


def assert_poisson(counts, expected, rate):
    """Both tails, each with half of the false-alarm rate."""
    for count, mean in zip(counts, expected, strict=True):
        assert scipy.stats.poisson.cdf(count, mean) > rate / 2
        assert scipy.stats.poisson.sf(count - 1, mean) > rate / 2


def test_the_tail_beyond_five_sigma():
    """33 million draws; false-alarm rate 1e-4 a limit."""
    assert_poisson(*tail_counts(4, 4096), 1e-4)


@pytest.mark.slow
def test_the_tail_beyond_six_and_a_half_sigma():
    """Two thousand million draws; false-alarm rate 1e-4 a limit."""
    assert_poisson(*tail_counts(250, 4096), 1e-4)


def test_no_direction_is_preferred():
    """Angles in 64 sectors; chi-square, false-alarm rate 1e-4."""
    pairs = draw(num_chunks=512).astype(np.float64).reshape(-1, 2)
    counts = np.histogram(np.arctan2(pairs[:, 1], pairs[:, 0]), 64, (-np.pi, np.pi))[0]
    assert scipy.stats.chisquare(counts).pvalue > 1e-4


@pytest.mark.parametrize("first_chunk", [0, 17])
def test_no_word_is_a_constant_of_the_program(first_chunk):
    """A compiler that folds what depends on the counter alone embeds arrays as long as the row."""

    @tf.function(jit_compile=True, autograph=False)
    def drawn(key, step):
        return tf.stack(normals.standard_normals(key, step, first_chunk, 64))

    compiled = drawn.experimental_get_compiler_ir(
        tf.constant(KEY.view(np.int64)), tf.constant(3, tf.int64)
    )(stage="optimized_hlo")
    constants = re.findall(r"\[(\d+)[^\]]*\][^ ]* constant\(", compiled)
    assert all(int(length) <= 16 for length in constants)


def test_a_part_equals_the_same_part_of_the_whole():
    whole = draw(step=9)
    part = draw(step=9, first_chunk=17, num_chunks=5)
    np.testing.assert_array_equal(part, whole[17 * normals.CHUNK : 22 * normals.CHUNK])


def test_counters_may_begin_anew_at_zero():
    """The key moves them: some key has its first chunk at the end of the 64 bits."""
    last = normals.CHUNK // 2
    key = np.array([KEY[0], 2**64 - last], np.uint64)
    first = np.array([KEY[0], 0], np.uint64)
    np.testing.assert_array_equal(
        draw(key=key, num_chunks=3)[normals.CHUNK :], draw(key=first, num_chunks=2)
    )
    assert not np.isin(draw(key=key, num_chunks=1), draw(key=first, num_chunks=2)).any()


def test_graph_eager_and_xla_agree():
    """Operation by operation, or with products fused to sums, the last places may differ."""
    compiled = draw(step=2)
    for jit_compile in (None, False):
        np.testing.assert_allclose(draw(step=2, jit_compile=jit_compile), compiled, atol=1e-13)


def test_counters_are_not_added_as_unsigned_numbers():
    """Grappler makes such sums an operation (AddN of uint64) that GPUs do not have."""
    drawn = tf.function(normals.standard_normals, autograph=False).get_concrete_function(
        tf.TensorSpec([2], tf.int64), tf.TensorSpec([], tf.int64), 3, 8
    )
    sums = [op for op in drawn.graph.get_operations() if op.type in ("Add", "AddV2")]
    sums = [op for op in sums if op.outputs[0].dtype == tf.uint64]
    assert sums
    # It joins sums that nothing else reads.
    joined = [t for op in sums for t in op.inputs if t.op in sums and len(t.consumers()) == 1]
    assert not joined


def test_fold_key_separates_purposes_and_runs():
    keys = [normals.fold_key(k, p) for k in (KEY, normals.fresh_key()) for p in ("a", "b")]
    assert len({key.tobytes() for key in keys}) == 4
    np.testing.assert_array_equal(normals.fold_key(KEY, "a"), keys[0])


def test_fresh_keys_differ():
    assert len({normals.fresh_key().tobytes() for _ in range(100)}) == 100


@pytest.mark.parametrize("seed", [0, 1, 2**40])
def test_seeds_give_distinct_keys(seed):
    assert normals.key_from_seed(seed).tobytes() != normals.key_from_seed(seed + 1).tobytes()
