"""A plan with a banded strategy: calibration, JSON, noise from the plan."""

import functools
import json

import numpy as np
import pytest

from keras_bandmf.noise import CorrelatedNoise
from keras_bandmf.planning.plan import TrainingPlan
from keras_bandmf.strategies import BandedStrategy
from tests.plans import make_plan

plan = functools.partial(make_plan, strategy="banded")


@pytest.fixture(scope="module")
def banded():
    return plan()


def test_the_named_strategy_is_the_optimum(banded):
    assert banded.strategy == BandedStrategy.optimize(60, 4)
    toeplitz = plan(strategy="toeplitz")
    assert banded.expected_rmse < toeplitz.expected_rmse
    # The accounting sees bands and column norms, which are the same.
    assert banded.epsilon() == toeplitz.epsilon()
    assert banded.sensitivity == 1.0 and banded.num_bands == 4
    assert "BandedStrategy, bands: 4" in str(banded)


def test_fixed_order():
    fixed = plan(num_bands=20, sampling="fixed_order")
    assert fixed.sensitivity == pytest.approx(np.sqrt(3), rel=1e-12)
    with pytest.raises(ValueError, match="num_bands=21"):
        plan(num_bands=21, sampling="fixed_order")


def test_json_is_exact_and_damage_is_refused(banded):
    again = TrainingPlan.from_json(banded.to_json())
    assert again == banded and again.strategy.columns.tobytes() == banded.strategy.columns.tobytes()
    document = json.loads(banded.to_json())
    columns = document["strategy"]["columns"]
    document["strategy"]["columns"] = (
        columns[:100] + ("A" if columns[100] != "A" else "B") + (columns[101:])
    )
    with pytest.raises(ValueError, match="damaged or was edited"):
        TrainingPlan.from_json(json.dumps(document))


@pytest.mark.parametrize("num_bands", [3, "auto"])
def test_calibrate(num_bands):
    arguments = {"num_examples": 1_000, "batch_size": 50, "epochs": 3, "epsilon": 1.0}
    arguments |= {"delta": 1e-5, "num_bands": num_bands}
    made = TrainingPlan.calibrate(**arguments, strategy="banded")
    toeplitz = TrainingPlan.calibrate(**arguments)
    assert type(made.strategy) is BandedStrategy and made.epsilon() <= 1.0
    assert made.num_bands == toeplitz.num_bands
    assert made.noise_multiplier == toeplitz.noise_multiplier
    assert made.expected_rmse <= toeplitz.expected_rmse * (1 + 1e-12)


def test_a_strategy_object_and_one_of_other_steps(banded):
    again = plan(strategy=banded.strategy)
    assert again == banded
    with pytest.raises(ValueError, match="Expected a strategy for 60 steps"):
        plan(strategy=BandedStrategy(np.ones((61, 4))))
    with pytest.raises(ValueError, match="that of the strategy, 4"):
        plan(num_bands=5, strategy=banded.strategy)


def test_a_subclass_that_could_claim_other_bands_is_refused(banded):
    class Claims(BandedStrategy):
        num_bands = 1

    with pytest.raises(ValueError, match="banded strategy"):
        plan(num_bands=None, strategy=Claims(np.ones((60, 4))))


def test_noise_of_the_plan_has_the_covariance_of_the_strategy(banded):
    # The standard deviation of a correlation from 20,000 columns is at most sqrt(2 / 20,000); one
    # of the 1,830 is beyond six of these once in 10^5 seeds.
    stream = CorrelatedNoise(banded.strategy, 1.0, [(20_000,)], seed=11)
    rows = np.array([stream.next()[0].numpy() for _ in range(60)], np.float64)
    inverse = np.linalg.inv(banded.strategy.materialize())
    expected = inverse @ inverse.T
    spread = np.sqrt(np.diag(expected))
    found = rows @ rows.T / rows.shape[1]
    assert np.max(np.abs(found - expected) / np.outer(spread, spread)) < 6 * np.sqrt(2 / 20_000)
