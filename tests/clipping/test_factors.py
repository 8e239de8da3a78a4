"""Factors against dense NumPy."""

import itertools

import numpy as np
import pytest
import tensorflow as tf

from keras_bandmf.clipping.factors import (
    NORM_BLOCK,
    Layout,
    Lookup,
    Outer,
    Rows,
    Unsupported,
    prefers_product,
)
from keras_bandmf.clipping.merge import Tied, merged
from keras_bandmf.clipping.modes import AutomaticClipping
from keras_bandmf.clipping.rules.embedding import lookup

WEIGHTS = np.array([0.5, 0.0, 1.0], "float32")
LAYOUT = Layout((5, 3))


def outer(rng, positions, groups=1, width_in=4, width_out=3):
    a = rng.normal(size=(3, groups, positions, width_in)).astype("float32")
    g = rng.normal(size=(3, groups, positions, width_out)).astype("float32")
    return a, g, np.einsum("bgti,bgto->bgio", a, g)


def check(factor, dense, tolerance=1e-5):
    norms = np.sum(np.square(dense.reshape(3, -1)), axis=1)
    np.testing.assert_allclose(factor.squared_norms(), norms, rtol=tolerance)
    expected = np.tensordot(WEIGHTS, dense, 1)
    np.testing.assert_allclose(
        tf.reshape(factor.weighted_sum(tf.constant(WEIGHTS)), expected.shape),
        expected,
        atol=1e-5 * np.abs(dense).max(),
    )


@pytest.mark.parametrize("positions", [1, 2, 9])
@pytest.mark.parametrize("groups", [1, 2])
def test_gram_and_product_agree(positions, groups):
    a, g, dense = outer(np.random.default_rng(0), positions, groups)
    factor = Outer(tf.constant(a), tf.constant(g), Layout((groups, 4, 3)))
    check(factor, dense)
    check(factor.as_rows(), dense)


def test_calls_are_joined_before_the_norm():
    rng = np.random.default_rng(1)
    parts = [outer(rng, t) for t in (1, 5)]
    factors = [Outer(tf.constant(a), tf.constant(g), Layout((4, 3))) for a, g, _ in parts]
    check(merged(factors), sum(p[2] for p in parts))
    check(merged([factors[0], factors[1].as_rows()]), sum(p[2] for p in parts))


@pytest.fixture(params=["by pairs", "by order"])
def lookup_route(request, monkeypatch):
    """Short sequences compare all pairs of positions, long ones are sorted."""
    limit = 64 if request.param == "by pairs" else 0
    monkeypatch.setattr("keras_bandmf.clipping.factors._FEW_POSITIONS", limit)


@pytest.mark.usefixtures("lookup_route")
def test_lookup_adds_repeated_rows_first():
    rng = np.random.default_rng(2)
    ids = np.array([[3, 1, 3, 3], [0, 0, 0, 0], [2, 1, 0, 4]], "int32")
    g = rng.normal(size=(3, 4, 2)).astype("float32")
    dense = np.zeros((3, 5, 2), "float32")
    for i in range(3):
        np.add.at(dense[i], ids[i], g[i])
    check(Lookup(tf.constant(ids), tf.constant(g), 5), dense)
    halves = [Lookup(tf.constant(ids[:, s]), tf.constant(g[:, s]), 5) for s in np.s_[:1, 1:]]
    check(merged(halves), dense)


def test_tied_table_is_unsupported():
    lookup = Lookup(tf.zeros((3, 1), tf.int32), tf.ones((3, 1, 2)), 5)
    with pytest.raises(Unsupported, match="tied"):
        merged([lookup, Rows(tf.ones((3, 5, 2)))])
    with pytest.raises(Unsupported, match="tied"):
        merged([Rows(tf.ones((3, 2, 5))), Rows(tf.ones((3, 5, 2)))])


def test_factors_of_different_kinds_are_not_joined():
    """Whichever comes first refuses the others, instead of leaving one out of the sum."""
    a, g = tf.ones((3, 1, 2, 5)), tf.ones((3, 1, 2, 4))
    lookup = Lookup(tf.zeros((3, 1), tf.int32), tf.ones((3, 1, 4)), 5)
    outer = Outer(a, g, Layout((5, 4)))
    rows = Rows(tf.ones((3, 5, 4)), Layout((5, 4)))
    tied = Tied(lookup, outer)
    for first, *others in itertools.permutations([lookup, outer, rows, tied], 2):
        with pytest.raises(Unsupported, match="tied"):
            first.joined([first, *others])
    with pytest.raises(Unsupported, match="tied"):
        outer.joined([outer, Outer(a, g, Layout((4, 5)))])
    assert tied.joined([tied]) is tied


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("where", ["a", "g"])
@pytest.mark.parametrize("positions", [1, 6])
@pytest.mark.parametrize("product", [False, True])
def test_dropped_rows_leave_no_trace(bad, where, positions, product):
    """Rule 4: 0 * NaN is NaN, so rows of weight zero are replaced before any product."""
    a, g, dense = outer(np.random.default_rng(3), positions)
    {"a": a, "g": g}[where][1, 0, 0, 0] = bad
    factor = Outer(tf.constant(a), tf.constant(g), Layout((4, 3)))
    factor = factor.as_rows() if product else factor
    assert not np.isfinite(factor.squared_norms()[1])
    dense[1] = 0
    total = factor.weighted_sum(tf.constant(WEIGHTS))
    np.testing.assert_allclose(
        tf.reshape(total, dense.shape[1:]), np.tensordot(WEIGHTS, dense, 1), atol=1e-5
    )


def test_gram_never_understates_a_cancelling_norm():
    """Where the Gram sum cancels to rounding error the norm must not be understated."""
    rng = np.random.default_rng(4)
    below = 0
    for _ in range(50):
        a = np.float32(1e3) + rng.normal(size=(1, 1, 8, 600)).astype("float32")
        g = rng.normal(size=(1, 1, 8, 500)).astype("float32")
        g -= g.mean(axis=2, keepdims=True)
        # Smaller still: the varying part of a is almost constant over positions, too.
        a = a.mean(axis=2, keepdims=True) + np.float32(1e-3) * (a - a.mean(axis=2, keepdims=True))
        exact = np.einsum("bgti,bgto->bgio", a.astype("float64"), g.astype("float64"))
        norm = np.sum(exact**2)
        factor = Outer(tf.constant(a), tf.constant(g), Layout((4, 3)))
        below += float(factor.squared_norms()[0]) < 0.9 * norm
    assert below == 0


@pytest.mark.parametrize("size", [7, 64, 100_003, 1_048_577, 4_718_592])
@pytest.mark.parametrize("jit", [False, True])
def test_norms_of_equal_numbers_keep_their_bound(size, jit):
    """Equal numbers round alike in each addition: a chain as long as they are many loses most."""
    values = tf.fill([2, size], tf.constant(0.1))
    found = tf.function(lambda v: Rows(v).squared_norms(), jit_compile=jit)(values).numpy()
    exact = size * float(np.float32(0.1)) ** 2
    assert np.all(np.abs(found / exact - 1) <= (NORM_BLOCK + size / NORM_BLOCK) * 2.0**-24)
    assert np.all(np.abs(found / exact - 1) < 4e-5)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("where", [0, 1500, 2999])
def test_numbers_that_are_not_finite_show_in_the_norm(bad, where):
    values = np.ones((2, 3000), "float32")
    values[0, where] = bad
    found = Rows(tf.constant(values)).squared_norms().numpy()
    assert not np.isfinite(found[0]) and found[1] == 3000.0


def test_product_only_where_it_is_small():
    assert not prefers_product(1, 2, 2)
    assert prefers_product(576, 288, 64)
    assert not prefers_product(16, 4096, 4096)
    assert prefers_product(tf.constant(5), 8, 8)


@pytest.mark.parametrize("positions", [1, 3])
@pytest.mark.parametrize("swap", [False, True])
def test_squares_that_vanish_do_not_hide_a_gradient(positions, swap):
    """In float32 the squares of entries below 1e-19 are zero; a factor of 1e18 makes them count."""
    small, large = (np.full((2, 1, positions, 8), v, "float32") for v in (1e-20, 1e18))
    a, g = (large, small) if swap else (small, large)
    factor = Outer(tf.constant(a), tf.constant(g), Layout((1, 8, 8)))
    norm = np.linalg.norm(np.einsum("bgti,bgto->bgio", a.astype("float64"), g)[0])
    assert norm > 0.05
    assert np.all(np.sqrt(factor.squared_norms()) >= norm)


@pytest.mark.parametrize("positions,width", [(1, 10_000), (8, 100)])
def test_many_squares_that_vanish_together_do_not_hide_a_gradient(positions, width):
    # Each loses less than counts; all of them together were 4 times the clip norm and more.
    a = np.full((1, 1, positions, width), 1e-19, "float32")
    g = np.full((1, 1, positions, 1), 5e11, "float32")
    factor = Outer(tf.constant(a), tf.constant(g), Layout((width, 1)))
    weights = AutomaticClipping(gamma=0.0).factors(tf.sqrt(factor.squared_norms()), 1.0)
    assert np.linalg.norm(factor.weighted_sum(weights)) <= 1.0001


@pytest.mark.usefixtures("lookup_route")
@pytest.mark.parametrize("size", [1e6, 1e7, 1e8, 1e12])
def test_look_ups_that_cancel_are_not_understated(size):
    rng = np.random.default_rng(0)
    g = (rng.normal(size=(16, 32, 8)) * size).astype("float32")
    g[:, 1::2] = -g[:, ::2]  # of one row of the table: next to nothing is left
    g[:, -1] += 10 * rng.normal(size=(16, 8))
    g = np.stack([example[rng.permutation(32)] for example in g])
    factor = Lookup(tf.zeros((16, 32), tf.int32), tf.constant(g), 4)
    weights = np.minimum(1.0, 1.0 / np.sqrt(factor.squared_norms()))
    for weight, row in zip(weights, np.eye(16, dtype="float32"), strict=True):
        # Its own rounding would make the contribution up to 2.4 times the clip norm.
        assert np.linalg.norm(factor.weighted_sum(tf.constant(weight * row))) <= 1.01


@pytest.mark.parametrize("compiled", [False, True])
def test_ids_that_no_row_has_are_not_understated(compiled):
    """XLA reads the nearest row of a table but drops what is scattered past its end."""
    g = tf.random.stateless_normal([3, 2, 4], [0, 1])
    a = tf.one_hot([[[4, 0]]] * 3, 5)
    ids = tf.constant([[9, 7], [9, -3], [2**40, 4]], tf.int64)

    @tf.function(jit_compile=compiled, autograph=False)
    def norms():
        # The matrix undoes what was read: at the nearest rows they cancel.
        tied = merged([lookup(ids, g, 5), Outer(a, -g[:, None], Layout((5, 4)))])
        sums = [tied.weighted_sum(tf.one_hot(i, 3)) for i in range(3)]
        return tied.squared_norms(), [tf.reduce_sum(tf.square(s)) for s in sums]

    squared, released = norms()
    assert (np.array(released) <= squared.numpy() * (1 + 1e-5)).all()


def test_uses_of_a_tied_table_that_cancel_keep_the_floor_of_both():
    """Rounding grows with what was added up in either use, and so does the least norm."""
    g = np.zeros((1, 2, 3), "float32")
    g[0] = [[1e4, 0, 0], [-1e4, 0, 0]]  # the look-ups cancel; the matrix's use is small
    a, b = np.full((1, 1, 2, 5), 1e-3, "float32"), np.full((1, 1, 2, 3), 1e-3, "float32")
    ids = tf.zeros((1, 2), tf.int32)
    tied = Tied(Lookup(ids, tf.constant(g), 5), Outer(tf.constant(a), tf.constant(b), LAYOUT))
    lengths = 2 * 1e4 + 2 * np.linalg.norm(a[0, 0, 0]) * np.linalg.norm(b[0, 0, 0])
    assert tied.squared_norms()[0] >= 64 * 2.0**-23 * lengths**2 * (1 - 1e-5)


@pytest.mark.parametrize("positions", [32, 64, 65])
def test_a_look_up_whose_positions_nearly_cancel_counts_for_the_clip_norm_at_most(positions):
    """What remains lies near the floor of the norm, with terms of float32 that vanish before it."""
    for rest in np.linspace(0, 4, 81):
        g = np.full((1, positions, 1), 0.99 * 2.0**-24, np.float32)
        g[0, 0], g[0, -2], g[0, -1] = 1, -1, rest * 64 * 2.0**-23
        factor = Lookup(tf.zeros((1, positions), tf.int32), tf.constant(g * 2.0**40), 1)
        norm = tf.sqrt(factor.squared_norms())
        contribution = float(tf.norm(factor.weighted_sum(1 / norm)))
        assert contribution <= 1 + 1e-5
