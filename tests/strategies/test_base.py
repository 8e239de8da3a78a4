"""The contract of a strategy: every public class keeps it."""

import dataclasses
import inspect
import json

import numpy as np
import pytest

import keras_bandmf as bandmf
from keras_bandmf import strategies
from keras_bandmf.strategies import Strategy
from tests.strategies import reference

STEPS = 12


def instances():
    """One strategy of each class that `from_config` knows."""
    return [
        strategies.ToeplitzStrategy(np.array([1.0, 0.5, 0.25]), STEPS),
        strategies.BandedStrategy(np.tile([1.0, 0.5], (STEPS, 1))),
        strategies.BlockDiagonalStrategy(
            strategies.BandedStrategy(np.tile([1.0, 0.5], (4, 1))), STEPS
        ),
        strategies.BandedInverseStrategy([1.0, -0.5, -0.125], STEPS),
        strategies.BufferedToeplitzStrategy(np.array([0.5]), np.array([0.5]), STEPS),
        strategies.TreeStrategy(STEPS),
    ]


def test_every_public_class_is_a_strategy():
    public = [getattr(strategies, name) for name in strategies.__all__]
    classes = {c for c in public if inspect.isclass(c) and issubclass(c, Strategy)}
    assert classes - {Strategy} == {type(strategy) for strategy in instances()}
    assert classes - {Strategy} == set(strategies._KINDS)


@pytest.mark.parametrize("strategy", instances(), ids=lambda s: type(s).__name__)
def test_the_contract(strategy):
    assert isinstance(strategy, Strategy)
    assert strategy.num_steps == STEPS and strategy.workload is None
    errors = strategy.per_step_error()
    assert errors.shape == (STEPS,) and errors.dtype == np.float64
    assert strategy.loss() == pytest.approx(np.mean(errors))
    assert strategy.loss("max") == pytest.approx(np.max(errors))
    matrix = strategy.materialize()
    assert matrix.shape[1] == STEPS
    assert np.max(np.linalg.norm(matrix, axis=0)) == pytest.approx(1.0)
    assert strategy.sensitivity() == pytest.approx(1.0)
    for fixed_order, patterns in (
        (False, reference.patterns),
        (True, reference.fixed_order_patterns),
    ):
        found = strategy.sensitivity(3, 2, fixed_order)
        truth = reference.largest_gram_sum(matrix, patterns(STEPS, 3, 2))
        assert found >= truth * (1 - 1e-12)
    with pytest.raises(dataclasses.FrozenInstanceError):
        strategy.num_steps = 5


@pytest.mark.parametrize("strategy", instances(), ids=lambda s: type(s).__name__)
def test_strategies_compare_by_value_and_go_through_json(strategy):
    config = json.loads(json.dumps(strategy.get_config()))
    assert config["class_name"] == type(strategy).__name__
    for back in (strategies.from_config(config), type(strategy).from_config(config)):
        assert type(back) is type(strategy)
        assert back == strategy and hash(back) == hash(strategy)
        np.testing.assert_array_equal(back.per_step_error(), strategy.per_step_error())
    others = [other for other in instances() if type(other) is not type(strategy)]
    assert all(strategy != other for other in [*others, None, "toeplitz"])


@pytest.mark.parametrize("strategy", instances()[:3], ids=lambda s: type(s).__name__)
def test_banded_strategies_define_the_recurrence_of_their_noise(strategy):
    """`x = C^-1 z` by the rows and the scale, against the dense matrix."""
    rows, tail = strategy.noise_rows(), strategy.tail_scale()
    assert rows.shape in {(1, strategy.num_bands), (STEPS, strategy.num_bands)}
    z, x = np.random.default_rng(0).normal(size=STEPS), np.zeros(STEPS)
    for i in range(STEPS):
        row = rows[min(i, len(rows) - 1)]
        past = sum(row[k] * x[i - k] for k in range(1, min(i + 1, strategy.num_bands)))
        x[i] = (z[i] - past) / row[0]
    x[STEPS - len(tail) :] *= tail
    np.testing.assert_allclose(strategy.materialize() @ x, z, atol=1e-12)


def test_the_base_class_is_abstract_and_no_plan_takes_a_stranger():
    with pytest.raises(TypeError, match="abstract"):
        Strategy()

    class Stranger(strategies.ToeplitzStrategy):
        """Claims any number of bands."""

    stranger = Stranger(np.array([1.0, 0.5]), STEPS)
    assert isinstance(stranger, Strategy)
    assert stranger != strategies.ToeplitzStrategy(np.array([1.0, 0.5]), STEPS)
    with pytest.raises(ValueError, match="banded strategy"):
        bandmf.TrainingPlan(
            num_examples=100,
            batch_size=5,
            num_steps=STEPS,
            noise_multiplier=1.0,
            delta=1e-5,
            strategy=stranger,
        )
