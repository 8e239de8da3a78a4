"""The comparison behind `calibrate`: both samplings, given numbers, strategy objects, workloads."""

import math

import keras
import numpy as np
import pytest

from keras_bandmf import compare_bands
from keras_bandmf.planning import arguments
from keras_bandmf.planning.plan import TrainingPlan
from keras_bandmf.strategies import ToeplitzStrategy, Workload
from tests.plans import dense_workload

# 2 epochs of 20 steps. Few rounds at a high rate: here a fixed order wins.
FEW = {"num_examples": 1_000, "batch_size": 50, "epochs": 2, "epsilon": 8.0, "delta": 1e-5}
# 1 epoch of 1,000 steps, little budget: amplification wins.
MANY = {"num_examples": 20_000, "batch_size": 20, "num_steps": 1_000, "epsilon": 0.3, "delta": 1e-6}


@pytest.mark.parametrize(("run", "winner"), [(FEW, "fixed_order"), (MANY, "cyclic_poisson")])
def test_auto_takes_the_better_sampling(run, winner):
    choice = compare_bands(**run, sampling="auto", num_bands=(4, 16))
    assert list(choice.curves) == ["cyclic_poisson", "fixed_order"]
    for name, curve in choice.curves.items():
        assert {row.sampling for row in curve.candidates} == {name}
        assert [row.num_bands for row in curve.candidates] == [1, 4, 16]
        assert choice.best.expected_rmse <= curve.best.expected_rmse
    assert choice.best.sampling == winner
    assert choice.dp_sgd.sampling == "cyclic_poisson" and choice.dp_sgd.num_bands == 1
    table = str(choice).splitlines()
    (star,) = (line for line in table if line.startswith("*"))
    assert winner in star and len(table) == 1 + len(choice.candidates)


def test_a_plan_says_what_auto_chose():
    made = TrainingPlan.calibrate(**FEW, sampling="auto", max_bands=16)
    assert (made.sampling, made.adjacency) == ("fixed_order", "zero-out")
    assert made.statement().adjacency == "zero-out" and "zero-out" in str(made)
    assert made.epsilon() <= 8.0
    assert made.num_bands == 16
    alone = TrainingPlan.calibrate(**FEW, sampling="fixed_order", num_bands=16)
    assert made.strategy == alone.strategy
    assert made.noise_multiplier == pytest.approx(alone.noise_multiplier, rel=2e-6)


def test_auto_sampling_for_a_strategy_object():
    strategy = ToeplitzStrategy([1.0, 0.5, 0.4], 40)
    made = TrainingPlan.calibrate(**FEW, sampling="auto", strategy=strategy)
    rows = compare_bands(**FEW, sampling="auto", strategy=strategy).of_bands(3)
    assert len(rows.candidates) == 2 and made.sampling == rows.best.sampling
    assert made.strategy is strategy
    assert made.expected_rmse == pytest.approx(rows.best.expected_rmse, rel=1e-2)


def test_given_numbers_and_objects():
    choice = compare_bands(**FEW, num_bands=(2, 5))
    assert [row.num_bands for row in choice.candidates] == [1, 2, 5]
    assert choice.of_bands(5).best.num_bands == 5
    strategy = ToeplitzStrategy([1.0, 0.5, 0.4], 40)
    one, own = compare_bands(**FEW, strategy=strategy).candidates
    assert (one.num_bands, own.strategy) == (1, strategy)


def test_under_a_workload_both_sides_of_a_ratio_are_of_it():
    workload = Workload(40, 0.1, momentum=0.5)
    one, four = compare_bands(**FEW, num_bands=4, workload=workload).candidates
    for row in (one, four):
        factor = dense_workload(workload) @ np.linalg.inv(row.strategy.materialize())
        error = np.mean(np.sum(factor**2, axis=1))
        expected = row.noise_multiplier * math.sqrt(error) / 2
        assert row.expected_rmse == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("num_bands", ["auto", 4])
def test_calibrate_resolves_its_arguments_once(num_bands, monkeypatch):
    resolved = []
    resolve = arguments.resolve_workload

    def count(*given):
        resolved.append(given)
        return resolve(*given)

    monkeypatch.setattr(arguments, "resolve_workload", count)
    optimizer = keras.optimizers.SGD(0.1, momentum=0.5)
    made = TrainingPlan.calibrate(
        **FEW, num_bands=num_bands, sampling="auto", max_bands=4, workload=optimizer
    )
    assert len(resolved) == 1
    assert made.workload == Workload(40, float(np.float32(0.1)), momentum=0.5)


def test_several_numbers_are_for_the_comparison_only():
    with pytest.raises(TypeError, match=r"num_bands=\(2, 4\)"):
        TrainingPlan.calibrate(**FEW, num_bands=(2, 4))
    with pytest.raises(TypeError, match=r"num_bands=\(2, 4\)"):
        compare_bands(**FEW, num_bands=(2, 4), strategy=ToeplitzStrategy([1.0, 0.5], 40))


def test_bad_arguments():
    with pytest.raises(ValueError, match="'fixed_order', 'auto'. Received: sampling='best'"):
        compare_bands(**FEW, sampling="best")
    with pytest.raises(ValueError, match="describe data in a fixed order"):
        compare_bands(**FEW, sampling="auto", max_participations=2, min_separation=5)
    with pytest.raises(ValueError, match="strategy='tree'"):
        compare_bands(**FEW, strategy="tree")
    with pytest.raises(ValueError, match="Expected a strategy for 40 steps"):
        compare_bands(**FEW, strategy=ToeplitzStrategy([1.0, 0.5], 41))
    with pytest.raises(TypeError, match="num_bands='many'"):
        compare_bands(**FEW, num_bands="many")
    with pytest.raises(TypeError, match="num_bands=2.5"):
        compare_bands(**FEW, num_bands=(2, 2.5))
    with pytest.raises(ValueError, match="workload.num_steps=39"):
        compare_bands(**FEW, workload=Workload(39))
