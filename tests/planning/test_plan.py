"""TrainingPlan: calibration, validation, JSON, fingerprint, statement, batches."""

import copy
import dataclasses
import json
import math
import pickle

import dp_accounting
import numpy as np
import pytest

from keras_bandmf.accounting.accountant import epsilon_of
from keras_bandmf.planning.plan import TrainingPlan
from keras_bandmf.strategies import ToeplitzStrategy
from tests.plans import make_plan as plan


@pytest.fixture(scope="module")
def default():
    return plan()


def test_derived_values(default):
    assert default.num_steps == 60
    assert default.steps_per_epoch == 20
    assert default.num_bands == 4
    assert default.sampling == "cyclic_poisson"
    assert default.sampling_probability == 4 * 50 / 1_000
    assert default.adjacency == "add-or-remove-one"
    assert default.sensitivity == pytest.approx(1.0, abs=1e-12)
    assert default.noise_stddev(0.5) == pytest.approx(0.75, rel=1e-12)
    assert (default.participations, default.separation) == (None, None)
    dense = default.strategy.materialize()
    error = np.sum((np.tril(np.ones((60, 60))) @ np.linalg.inv(dense)) ** 2) / 60
    assert default.expected_rmse == pytest.approx(1.5 * math.sqrt(error) / 3, rel=1e-9)


def test_steps_are_whole_batches_an_epoch():
    assert plan(num_examples=1_049).num_steps == 60  # 49 examples are left over
    assert plan(epochs=None, num_steps=7).num_steps == 7


def test_fixed_order():
    fixed = plan(sampling="fixed_order", epochs=None, num_steps=50, num_bands=8)
    assert fixed.adjacency == "zero-out"
    assert fixed.sampling_probability is None
    assert (fixed.participations, fixed.separation) == (3, 20)
    dense = fixed.strategy.materialize()
    # The worst example takes part every 20 steps; no other offset or pattern is worse.
    worst = max(np.linalg.norm(dense[:, first::20].sum(axis=1)) for first in range(20))
    assert fixed.sensitivity == pytest.approx(math.sqrt(3), rel=1e-12)
    assert worst == pytest.approx(fixed.sensitivity, rel=1e-9)
    assert fixed.noise_stddev(2.0) == pytest.approx(1.5 * math.sqrt(3) * 2.0, rel=1e-12)
    assert fixed.dp_event() == dp_accounting.GaussianDpEvent(1.5)


def test_events_and_epsilon_of_partial_runs(default):
    assert default.dp_event().count == 15
    assert default.dp_event(5).count == 2
    assert default.epsilon() == epsilon_of(default.dp_event(), 1e-5)
    assert default.epsilon(60) == default.epsilon()
    assert default.epsilon(0) == 0.0
    assert default.epsilon(4) < default.epsilon(5) < default.epsilon()
    for steps in (61, -1, 1.0, True):
        with pytest.raises((ValueError, TypeError), match="steps"):
            default.epsilon(steps)


def test_calibrate_meets_the_target():
    for sampling in ("cyclic_poisson", "fixed_order"):
        made = TrainingPlan.calibrate(
            num_examples=1_000, batch_size=50, epochs=3, epsilon=2.0, delta=1e-5, sampling=sampling
        )
        assert 2.0 * (1 - 1e-4) < made.epsilon() <= 2.0
        assert made.num_steps == 60
        single = TrainingPlan.calibrate(
            num_examples=1_000,
            batch_size=50,
            num_steps=60,
            epsilon=2.0,
            delta=1e-5,
            num_bands=1,
            sampling=sampling,
        )
        assert single.num_bands == 1
        assert made.num_bands > 1
        assert made.expected_rmse < single.expected_rmse


@pytest.mark.slow
def test_auto_against_an_independent_computation():
    # n = 4096, 8 epochs, epsilon 1, delta 1e-6: among powers of two the best raw Toeplitz strategy
    # has 16 bands and RMSE 3.4763; column normalisation gains a little.
    made = TrainingPlan.calibrate(
        num_examples=51_200, batch_size=100, num_steps=4_096, epsilon=1.0, delta=1e-6
    )
    assert 11 <= made.num_bands <= 23
    assert 3.4763 * 0.995 < made.expected_rmse < 3.4763


def test_calibrate_a_strategy_object():
    strategy = ToeplitzStrategy([1.0, 0.6, 0.3], 60, column_normalize=False)
    made = TrainingPlan.calibrate(
        num_examples=1_000, batch_size=50, epochs=3, epsilon=1.0, delta=1e-5, strategy=strategy
    )
    assert made.strategy is strategy
    assert made.num_bands == 3
    assert made.epsilon() <= 1.0
    assert plan(num_bands=3, strategy=strategy) == plan(num_bands=None, strategy=strategy)
    with pytest.raises(ValueError, match="Expected `num_bands` to be that of the strategy, 3"):
        plan(num_bands=4, strategy=strategy)


def test_json_is_exact(default):
    for original in (
        default,
        plan(noise_multiplier=0.1 + 0.2, delta=1e-9 / 3, sampling="fixed_order", num_bands=20),
        plan(sampling="fixed_order", max_participations=2, min_separation=5, noise_multiplier=1),
        plan(num_bands=None, strategy=ToeplitzStrategy([1.0, 1 / 3], 60, column_normalize=False)),
    ):
        again = TrainingPlan.from_json(original.to_json())
        assert again == original
        assert hash(again) == hash(original)
        assert again.fingerprint == original.fingerprint
        assert again.noise_multiplier == original.noise_multiplier
        np.testing.assert_array_equal(again.strategy.coefficients, original.strategy.coefficients)
        assert str(again) == str(original)
        assert pickle.loads(pickle.dumps(original)) == copy.deepcopy(original) == original


# Written by an earlier release. Files like it are kept, so it must be read back to the last bit.
EARLIER = """{
  "format": "keras_bandmf.TrainingPlan",
  "version": 1,
  "num_examples": 1000,
  "batch_size": 50,
  "num_steps": 60,
  "noise_multiplier": 1.5,
  "delta": 1e-05,
  "sampling": "cyclic_poisson",
  "strategy": {
    "class_name": "ToeplitzStrategy",
    "num_steps": 60,
    "coefficients": [
      0.7118339254800751,
      0.4732229470721356,
      0.395127601108991,
      0.3364917290838568
    ],
    "column_normalize": true
  },
  "max_participations": null,
  "min_separation": null
}"""


def test_the_json_of_an_earlier_release_is_read_and_written_the_same(default):
    made = TrainingPlan.from_json(EARLIER)
    assert made.to_json() == EARLIER
    assert made.fingerprint == "66809d6a1290c75fdd70f9981e001e21f8dcc82a36e70dbfbf824dc92e03efd7"
    # The search may round otherwise on another machine.
    np.testing.assert_allclose(made.strategy.coefficients, default.strategy.coefficients, 1e-6)


def test_fingerprint_tells_plans_apart(default):
    assert len(default.fingerprint) == 64
    others = [
        plan(noise_multiplier=np.nextafter(1.5, 2)),
        plan(delta=2e-5),
        plan(num_bands=3),
        plan(num_examples=1_001),
        plan(sampling="fixed_order"),
        plan(strategy=ToeplitzStrategy([1.0, 0.5, 0.2, 0.1], 60)),
    ]
    assert len({default.fingerprint, *(other.fingerprint for other in others)}) == 7
    assert default != others[0]
    assert plan() == default


def test_json_refuses_the_unknown(default):
    document = json.loads(default.to_json())
    strategy = document["strategy"]
    for change in (
        {"version": 4},
        {"format": "keras_bandmf.Statement"},
        {"seed": 1},
        {"strategy": {**strategy, "class_name": "DenseStrategy"}},
        {"strategy": "toeplitz"},
        {"noise_multiplier": -1.0},
        {"num_steps": 61},  # not the strategy's
        {"num_steps": 60.5},
        {"batch_size": 500},  # q > 1
    ):
        with pytest.raises((ValueError, TypeError)):
            TrainingPlan.from_json(json.dumps({**document, **change}))
    del document["sampling"]
    with pytest.raises(ValueError, match="sampling"):
        TrainingPlan.from_json(json.dumps(document))


def test_it_is_frozen(default):
    with pytest.raises(dataclasses.FrozenInstanceError):
        default.noise_multiplier = 0.1
    assert dataclasses.replace(default, delta=1e-7).delta == 1e-7


def test_print(default):
    text = str(default)
    for fact in ("1000", "60 (3 epochs of 20)", "i mod 4", "0.2", "1.5", "1e-05", "add-or-remove"):
        assert fact in text
    assert "inf" in str(plan(noise_multiplier=0))


def test_statement_is_of_a_plan(default):
    statement = default.statement()
    assert not statement.executed
    assert statement.private
    assert statement.epsilon == default.epsilon()
    assert (statement.steps_charged, statement.steps_run, statement.num_steps) == (60, 0, 60)
    assert statement.l2_norm_clip is None
    assert statement.plan_fingerprint == default.fingerprint
    assert statement.caveats == ()
    assert "planned, not executed" in str(statement)
    part = default.statement(20)
    assert part.epsilon == default.epsilon(20)
    assert "fixed in advance" in str(part)


def test_statement_of_hopeless_plans():
    assert "exceeds 1 / num_examples" in " ".join(str(plan(delta=0.01).statement()).split())
    nothing = plan(noise_multiplier=0.0).statement()
    assert not nothing.private
    assert "NOT PRIVATE" in str(nothing)
    assert "declared" not in str(nothing)


def test_statement_quotes_declared_participations():
    declared = plan(sampling="fixed_order", max_participations=2, min_separation=5)
    text = " ".join(str(declared.statement()).split())
    assert "declared by the user, not checked: at most 2 participations" in text
    assert "at least 5 steps apart" in text
    with pytest.raises(ValueError, match="declares no participations"):
        declared.batches(np.zeros((1_000, 2)))


def test_batches_follow_the_plan(default):
    x, y = np.arange(1_000.0)[:, None], np.arange(1_000)
    batches = default.batches(x, y, seed=3)
    assert batches.plan_fingerprint == default.fingerprint
    assert (batches.num_examples, batches.batch_size, batches.num_steps) == (1_000, 50, 60)
    seen = [set(batches.indices(step).tolist()) for step in range(8)]
    assert seen[0].isdisjoint(seen[1] | seen[2] | seen[3])  # other groups
    with pytest.raises(ValueError):
        default.batches(x[:999], y[:999])


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"num_bands": "auto"}, "TrainingPlan.calibrate"),
        ({"sampling": "auto"}, "choose `sampling`"),
        ({"num_bands": 21}, "Use at most 20 bands"),
        ({"num_bands": 61, "batch_size": 1, "epochs": None, "num_steps": 60}, "Use fewer bands"),
        ({"num_bands": 0}, "num_bands=0"),
        ({"batch_size": 1_001}, "batch_size=1001"),
        ({"batch_size": 0}, "batch_size=0"),
        ({"num_examples": 0}, "num_examples=0"),
        ({"epochs": 0}, "epochs=0"),
        ({"epochs": None}, "exactly one of"),
        ({"num_steps": 60}, "exactly one of"),
        ({"epochs": None, "num_steps": 0}, "num_steps=0"),
        ({"noise_multiplier": -0.5}, "noise_multiplier=-0.5"),
        ({"noise_multiplier": math.nan}, "noise_multiplier=nan"),
        ({"noise_multiplier": math.inf}, "noise_multiplier=inf"),
        ({"delta": 0.0}, "delta=0.0"),
        ({"delta": 1.0}, "delta=1.0"),
        ({"sampling": "shuffle"}, "sampling='shuffle'"),
        ({"strategy": "tree"}, "strategy='tree'"),
        ({"strategy": object()}, "banded strategy"),
        ({"max_participations": 3, "min_separation": 20}, "max_participations=3"),
        ({"sampling": "fixed_order", "min_separation": 20}, "together"),
        ({"num_bands": None, "strategy": ToeplitzStrategy([1.0, 0.5], 61)}, "num_steps=61"),
    ],
)
def test_bad_values(changes, words):
    with pytest.raises(ValueError, match=words):
        plan(**changes)


@pytest.mark.parametrize(
    "changes",
    [
        {"epochs": 2.5},
        {"epochs": True},
        {"num_examples": 1_000.0},
        {"batch_size": "50"},
        {"num_bands": None},
        {"num_bands": 2.0},
        {"noise_multiplier": True},
        {"noise_multiplier": None},
        {"delta": "small"},
        {"sampling": None},
    ],
)
def test_bad_types(changes):
    with pytest.raises(TypeError, match=f"Received: {next(iter(changes))}="):
        plan(**changes)


def test_a_strategy_that_only_claims_its_bands_is_refused():
    class Dense(ToeplitzStrategy):
        """Could return anything from noise_rows."""

    with pytest.raises(ValueError, match="banded strategy"):
        plan(num_bands=None, strategy=Dense([1.0, 0.5], 60))


def test_bad_targets():
    good = {"num_examples": 1_000, "batch_size": 50, "epochs": 3, "epsilon": 1.0, "delta": 1e-5}
    for change in ({"epsilon": 0.0}, {"epsilon": math.inf}, {"delta": 0.0}, {"max_bands": 0}):
        with pytest.raises(ValueError, match=next(iter(change))):
            TrainingPlan.calibrate(**{**good, **change})
    with pytest.raises(TypeError, match="num_bands='many'"):
        TrainingPlan.calibrate(**good, num_bands="many")
    with pytest.raises(ValueError, match="strategy='tree'"):
        TrainingPlan.calibrate(**good, strategy="tree")


def test_other_integers_are_welcome():
    made = plan(num_examples=np.int64(1_000), num_bands=np.int32(4), noise_multiplier=np.float64(2))
    assert type(made.num_examples) is int
    assert type(made.noise_multiplier) is float
    json.loads(made.to_json())
