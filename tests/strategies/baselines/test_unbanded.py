"""Strategies for comparison that are not banded: against dense matrices; refused for training."""

import json
import math

import numpy as np
import pytest

import keras_bandmf as bandmf
from keras_bandmf import strategies
from keras_bandmf.strategies import (
    BufferedToeplitzStrategy,
    ToeplitzStrategy,
    TreeStrategy,
)
from keras_bandmf.strategies.baselines import tree
from keras_bandmf.strategies.baselines.buffered import _Objective, inverse_buffers
from tests.strategies import reference

DECAY, SCALE = [0.3, 0.9, 0.99], [0.3, 0.2, 0.1]


def unbanded(num_steps):
    return [
        BufferedToeplitzStrategy(DECAY, SCALE, num_steps),
        BufferedToeplitzStrategy([0.0], [0.5], num_steps),
        BufferedToeplitzStrategy([0.9, 0.9], [0.1, 0.3], num_steps),
        *(TreeStrategy(num_steps, decoder) for decoder in ("plain", "online", "full")),
    ]


def dense_tree(num_steps):
    """C of the tree before scaling, by its definition."""
    rows, size = [], 1
    while size <= num_steps:
        for first in range(0, num_steps - size + 1, size):
            rows.append([1.0 if first <= i < first + size else 0.0 for i in range(num_steps)])
        size *= 2
    return np.array(rows)


def below(matrix, row):
    """The rows of the tree whose steps are all among those of a row."""
    return np.flatnonzero(np.all(matrix <= matrix[row], axis=1))


def dense_decoder(matrix, decoder):
    """B by its definition: from all nodes, or from the fewest, each alone or with those below."""
    n = matrix.shape[1]
    sums = np.tril(np.ones((n, n)))
    if decoder == "full":
        return sums @ np.linalg.pinv(matrix)
    rows = np.zeros((n, len(matrix)))
    sizes = matrix.sum(axis=1)
    for i in range(n):
        first = 0
        while first < i + 1:
            fitting = (matrix[:, first] == 1) & (sizes <= i + 1 - first)
            fitting &= np.cumsum(matrix, axis=1)[:, first] == 1  # begins there
            node = max(np.flatnonzero(fitting), key=lambda r: sizes[r])
            if decoder == "plain":
                rows[i, node] = 1.0
            else:
                among = below(matrix, node)
                steps = np.flatnonzero(matrix[node])
                estimate = np.linalg.pinv(matrix[np.ix_(among, steps)]).sum(axis=0)
                rows[i, among] += estimate
            first += int(sizes[node])
    np.testing.assert_allclose(rows @ matrix, sums, atol=1e-12)
    return rows


@pytest.mark.parametrize("n", [1, 2, 5, 8, 64, 100, 200])
def test_toeplitz_errors_are_those_of_the_dense_matrix(n):
    for s in unbanded(n):
        matrix = s.materialize()
        norms = np.linalg.norm(matrix, axis=0)
        assert np.max(norms) == pytest.approx(1.0, rel=1e-13)
        if isinstance(s, TreeStrategy):
            continue
        expected = reference.dense_errors(matrix)
        np.testing.assert_allclose(s.per_step_error(), expected, rtol=1e-10)
        assert s.loss("mean") == pytest.approx(np.mean(expected), rel=1e-10)
        assert s.loss("max") == pytest.approx(np.max(expected), rel=1e-10)


@pytest.mark.parametrize("decoder", ["plain", "online", "full"])
@pytest.mark.parametrize("n", [1, 2, 3, 7, 8, 23, 64, 100])
def test_tree_errors_are_those_of_the_dense_decoder(n, decoder):
    s = TreeStrategy(n, decoder)
    matrix = dense_tree(n)
    levels = np.max(matrix.sum(axis=0))
    np.testing.assert_allclose(s.materialize(), matrix / np.sqrt(levels), rtol=1e-14)
    expected = levels * np.sum(dense_decoder(matrix, decoder) ** 2, axis=1)
    np.testing.assert_allclose(s.per_step_error(), expected, rtol=1e-10)
    assert s.loss("max") == pytest.approx(np.max(expected), rel=1e-10)


def test_a_better_decoder_of_the_tree_has_a_lower_error():
    plain, online, full = (TreeStrategy(1000, d).loss() for d in ("plain", "online", "full"))
    assert full < online < plain


def test_a_million_steps():
    errors = BufferedToeplitzStrategy(DECAY, SCALE, 10**6).per_step_error()
    short = BufferedToeplitzStrategy(DECAY, SCALE, 10**5).per_step_error()
    np.testing.assert_allclose(errors[: 10**5], short, rtol=1e-10)


def test_inverse_of_a_buffered_matrix_has_its_form():
    decay, scale = inverse_buffers(np.array(DECAY), np.array(SCALE))
    s = BufferedToeplitzStrategy(DECAY, SCALE, 60)
    column = np.linalg.inv(s.materialize())[:, 0] / np.linalg.norm(s.first_column())
    powers = decay[:, None] ** np.arange(59)
    np.testing.assert_allclose(column[1:], -scale @ powers, rtol=1e-9, atol=1e-13)


@pytest.mark.parametrize("error", ["mean", "max"])
def test_gradient_of_the_buffered_objective(error):
    objective = _Objective(200, error, 3, 50)
    point = np.random.default_rng(0).standard_normal(6)
    value, gradient = objective(point)
    units = 1e-5 * np.eye(6)
    central = [(objective(point + u)[0] - objective(point - u)[0]) / 2e-5 for u in units]
    np.testing.assert_allclose(gradient, central, rtol=1e-6, atol=1e-9)


def test_optimised_buffers_are_at_the_reference_or_below():
    s = BufferedToeplitzStrategy.optimize(16384, 3, "mean", 8, 2048)
    assert s.num_buffers == 3
    # Another implementation's optimum of the same problem, to seven digits.
    found = math.sqrt(s.loss("mean")) * s.sensitivity(8, 2048)
    assert 12.9 < found < 12.9621495


def test_more_buffers_come_closer_to_the_optimal_coefficients():
    losses = [BufferedToeplitzStrategy.optimize(500, d).loss() for d in (1, 2, 3)]
    best = ToeplitzStrategy.optimize(500, 500, column_normalize=False).loss()
    assert losses[0] > losses[1] > losses[2] > best
    assert losses[2] < 1.005 * best
    by_max = BufferedToeplitzStrategy.optimize(500, 2, error="max")
    assert by_max.loss("max") < BufferedToeplitzStrategy.optimize(500, 2).loss("max")


@pytest.mark.parametrize("n", [1, 2, 3])
def test_buffers_of_few_steps(n):
    s = BufferedToeplitzStrategy.optimize(n, 2, callback=lambda _: None)
    best = ToeplitzStrategy.optimize(n, n, column_normalize=False).loss()
    assert best * (1 - 1e-9) <= s.loss() <= best * (1 + 1e-6)


@pytest.mark.parametrize("n,k,separation", [(16, 4, 4), (16, 3, 5), (13, 13, 3), (24, 3, 6)])
def test_sensitivity_against_every_pattern(n, k, separation):
    for s in unbanded(n):
        matrix = s.materialize()
        assert s.sensitivity() == pytest.approx(1.0)
        allowed = reference.patterns(n, k, separation)
        expected = reference.largest_gram_sum(matrix, allowed)
        assert s.sensitivity(k, separation) == pytest.approx(expected, rel=1e-12)
        fits = min(k, -(-n // separation))
        allowed = reference.fixed_order_patterns(n, fits, separation)
        expected = reference.largest_gram_sum(matrix, allowed)
        got = s.sensitivity(k, separation, fixed_order=True)
        assert got == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("n,k,separation", [(16, 4, 4), (16, 3, 4), (32, 4, 8), (64, 8, 8)])
def test_bound_of_the_tree_is_exact_for_powers_of_two(n, k, separation, monkeypatch):
    monkeypatch.setattr(tree, "is_affordable", lambda *_: False)
    s = TreeStrategy(n)
    got = s.sensitivity(k, separation)
    assert got == pytest.approx(s.sensitivity(k, separation, fixed_order=True), rel=1e-13)


@pytest.mark.parametrize("n", [7, 16, 21, 29])
def test_bound_of_the_tree_is_never_below_brute_force(n, monkeypatch):
    monkeypatch.setattr(tree, "is_affordable", lambda *_: False)
    s = TreeStrategy(n)
    for k, separation in [(2, 1), (3, 2), (4, 3), (5, 5), (3, 6)]:
        truth = reference.largest_gram_sum(s.materialize(), reference.patterns(n, k, separation))
        assert truth * (1 - 1e-12) <= s.sensitivity(k, separation) <= 1.5 * truth


def test_rising_buffers_are_bounded():
    s = BufferedToeplitzStrategy([0.9, 0.8], [0.9, 0.9], 12)
    for k, separation in [(2, 1), (3, 2), (2, 5)]:
        allowed = reference.patterns(12, k, separation)
        truth = reference.largest_gram_sum(s.materialize(), allowed)
        assert s.sensitivity(k, separation) >= truth * (1 - 1e-12)


def test_json_is_exact_and_values_compare():
    for s, other in zip(unbanded(20), unbanded(21), strict=True):
        back = strategies.from_config(json.loads(json.dumps(s.get_config())))
        assert back == s and hash(back) == hash(s) and type(back) is type(s)
        assert s != other and type(s).__name__ in repr(s)
        with pytest.raises(ValueError, match="Received: config with"):
            strategies.from_config({**s.get_config(), "extra": 1})


def test_training_refuses_what_is_not_banded():
    for s in unbanded(20):
        assert not hasattr(s, "num_bands")
        with pytest.raises(AttributeError, match="`num_bands`. Received: strategy="):
            _ = s.num_bands
        for name in ("noise_rows", "tail_scale"):
            with pytest.raises(NotImplementedError, match=f"banded.*`{name}.*Received: strategy="):
                getattr(s, name)()
        for sampling in ("cyclic_poisson", "fixed_order"):
            with pytest.raises(ValueError, match="banded strategy.*Received: strategy="):
                bandmf.TrainingPlan(
                    num_examples=100,
                    batch_size=10,
                    num_steps=20,
                    noise_multiplier=1.0,
                    delta=1e-5,
                    strategy=s,
                    sampling=sampling,
                )


@pytest.mark.parametrize("bad", [0, -1, 2.0, True, None, 10**8 + 1])
def test_bad_steps(bad):
    for make in (
        lambda: TreeStrategy(bad),
        lambda: BufferedToeplitzStrategy(DECAY, SCALE, bad),
        lambda: BufferedToeplitzStrategy.optimize(bad, 2),
    ):
        with pytest.raises((TypeError, ValueError), match="`num_steps`.*Received: num_steps="):
            make()


def test_bad_arguments():
    with pytest.raises(
        (TypeError, ValueError), match="Expected `decoder` to be one of 'plain', 'online', 'full'"
    ):
        TreeStrategy(5, "honaker")
    with pytest.raises((TypeError, ValueError), match="`num_buffers` to be at most 8"):
        BufferedToeplitzStrategy.optimize(5, 9)
    for name, value in [("error", "rms"), ("max_participations", 0), ("min_separation", 0)]:
        with pytest.raises((TypeError, ValueError), match=f"`{name}`"):
            BufferedToeplitzStrategy.optimize(5, 2, **{name: value})
    with pytest.raises((TypeError, ValueError), match="Expected `error` to be"):
        TreeStrategy(5).loss("rms")
    for s in unbanded(10_001):
        with pytest.raises((TypeError, ValueError), match="num_steps=10001"):
            s.materialize()


@pytest.mark.parametrize(
    "bad", [[], [[0.5]], [-0.1], [np.nan], ["a"], None, 0.5, [[0.1], [0.1, 1]]]
)
def test_bad_buffers(bad):
    with pytest.raises(ValueError, match="Expected `buffer_decay` to be a vector"):
        BufferedToeplitzStrategy(bad, [0.5], 5)
    with pytest.raises(ValueError, match="Expected `output_scale` to be a vector"):
        BufferedToeplitzStrategy([0.5], bad, 5)


def test_buffers_that_do_not_fit():
    with pytest.raises(ValueError, match="2 and 1 entries"):
        BufferedToeplitzStrategy([0.5], [0.1, 0.2], 5)
    for decay, scale in [([1.0], [0.1]), ([0.0], [1.0]), ([0.5, 0.5], [0.8, 0.8])]:
        with pytest.raises(ValueError, match="C\\^-1 grows"):
            BufferedToeplitzStrategy(decay, scale, 5)


def test_square_root_of_a_toeplitz_strategy():
    full = ToeplitzStrategy.square_root(40, column_normalize=False)
    matrix = full.materialize()
    np.testing.assert_allclose((matrix @ matrix / matrix[0, 0] ** 2), np.tril(np.ones((40, 40))))
    cut = ToeplitzStrategy.square_root(40, 8)
    assert cut.num_bands == 8 and cut.column_normalize
    np.testing.assert_allclose(cut.coefficients[1] / cut.coefficients[0], 0.5)
    assert ToeplitzStrategy.square_root(9, 1).loss() == 5.0
    with pytest.raises(ValueError, match="num_bands=41, num_steps=40"):
        ToeplitzStrategy.square_root(40, 41)
