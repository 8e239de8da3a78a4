"""The counter-based stream: normal, independent over steps, the same in parts as in one piece."""

import re

import numpy as np
import pytest
import scipy.stats
import tensorflow as tf

from keras_bandmf.noise import normals

KEY = normals.key_from_seed(3)


def draw(step=0, first_chunk=0, num_chunks=64, key=KEY, **options):
    function = tf.function(normals.standard_normals, **options) if options else None
    return (function or normals.standard_normals)(
        tf.constant(key.view(np.int64)), tf.constant(step, tf.int64), first_chunk, num_chunks
    ).numpy()


def test_values_are_standard_normal():
    """Kolmogorov-Smirnov and moments; each part has a false-alarm rate of 1e-4."""
    values = draw(num_chunks=512).astype(np.float64)
    assert scipy.stats.kstest(values, "norm").pvalue > 1e-4
    limit = scipy.stats.norm.isf(0.5e-4)
    count = values.size
    assert abs(values.mean()) * np.sqrt(count) < limit
    assert abs((values**2).mean() - 1) * np.sqrt(count / 2) < limit
    assert abs((values**4).mean() - 3) * np.sqrt(count / 96) < limit
    assert np.abs(values).max() < 6.7


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
    neighbours = np.stack([rows[:, :-1], rows[:, 1:]], axis=-1).reshape(-1, 2)
    assert len(np.unique(neighbours, axis=0)) == len(neighbours)


WORDS = np.array([0, 1, 2, 3, 4, 8, 2**31 - 1, 2**31, 2**31 + 2, 2**32 - 2, 2**32 - 1], np.uint32)
# Radii on both sides of the place where the logarithm changes, and the smallest.
WORDS = np.concatenate([WORDS, 2**32 - 1 - 2 ** np.arange(1, 29, 3), [15 * 2**28]]).astype(
    np.uint32
)


@pytest.mark.parametrize("jit_compile", [False, True])
def test_box_muller_is_that_of_float64(jit_compile):
    """The radius from 31 bits of one word; direction, swap and sign from the other."""
    drawn = np.random.default_rng(0).integers(0, 2**32, (2, 10_000), dtype=np.uint32)
    extreme = np.stack(np.meshgrid(WORDS, WORDS)).reshape(2, -1)
    magnitude, angle = np.concatenate([drawn, extreme], axis=1)
    compiled = tf.function(normals.box_muller, jit_compile=jit_compile, autograph=False)
    found = compiled(tf.constant(magnitude), tf.constant(angle))
    radius = np.sqrt(-2 * np.log((magnitude >> 1) * 2.0**-31 + 2.0**-32))
    turn = ((angle.view(np.int32) >> 2) + 0.5) * 2.0**-29 * np.pi / 4
    cosine = radius * np.cos(turn) * np.where(angle & 2, -1, 1)
    sine = radius * np.sin(turn)
    expected = np.where(angle & 1, [sine, cosine], [cosine, sine])
    np.testing.assert_allclose(np.array(found), expected, rtol=2e-6)
    assert 0 < np.abs(found).min() and np.abs(found).max() < 6.67


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
        return normals.standard_normals(key, step, first_chunk, 64)

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


def test_graph_and_xla_agree_with_eager():
    eager = draw(step=2)
    np.testing.assert_array_equal(draw(step=2, autograph=False), eager)
    np.testing.assert_array_equal(draw(step=2, jit_compile=True), eager)


def test_functions_that_run_eagerly_agree():
    """Operation by operation the last places may differ."""
    compiled = draw(step=2, num_chunks=2)
    tf.config.run_functions_eagerly(True)
    try:
        np.testing.assert_allclose(draw(step=2, num_chunks=2), compiled, atol=3e-6)
    finally:
        tf.config.run_functions_eagerly(False)


def test_fold_key_separates_purposes_and_runs():
    keys = [normals.fold_key(k, p) for k in (KEY, normals.fresh_key()) for p in ("a", "b")]
    assert len({key.tobytes() for key in keys}) == 4
    np.testing.assert_array_equal(normals.fold_key(KEY, "a"), keys[0])


def test_fresh_keys_differ():
    assert len({normals.fresh_key().tobytes() for _ in range(100)}) == 100


@pytest.mark.parametrize("seed", [0, 1, 2**40])
def test_seeds_give_distinct_keys(seed):
    assert normals.key_from_seed(seed).tobytes() != normals.key_from_seed(seed + 1).tobytes()
