"""All rows of a user at once, in a plan that samples rows."""

import math

import pytest

import keras_bandmf as bandmf
from tests.plans import make_plan


def dp_sgd(**changes):
    return make_plan(**({"num_bands": 1, "noise_multiplier": 3.0, "epochs": 1} | changes))


def test_one_row_costs_what_the_plan_says():
    plan = dp_sgd()
    assert bandmf.group_epsilon(plan, 1) == pytest.approx(plan.epsilon(), rel=5e-3)
    assert bandmf.group_epsilon(plan, 1) >= plan.epsilon() * (1 - 1e-4)


def test_more_rows_cost_more_and_at_most_the_rule_of_groups():
    """Without sampling k rows are a shift of k clip norms."""
    plan = dp_sgd()
    one, two, four = (bandmf.group_epsilon(plan, k) for k in (1, 2, 4))
    assert one < two < four
    whole = dp_sgd(batch_size=1_000, num_steps=4, epochs=None, noise_multiplier=10.0)
    shifted = dp_sgd(batch_size=1_000, num_steps=4, epochs=None, noise_multiplier=10.0 / 3)
    assert bandmf.group_epsilon(whole, 3) == pytest.approx(shifted.epsilon(), rel=5e-3)


def test_no_noise_is_no_privacy():
    assert bandmf.group_epsilon(dp_sgd(noise_multiplier=0.0), 2) == math.inf


@pytest.mark.parametrize(
    "changes", [{"num_bands": 2}, {"sampling": "fixed_order"}, {"unit": "user"}]
)
def test_refuses_other_plans(changes):
    with pytest.raises(ValueError, match="unit='user'"):
        bandmf.group_epsilon(dp_sgd(**changes), 2)


@pytest.mark.parametrize(
    ("size", "error"), [(0, ValueError), (2.5, TypeError), (1_001, ValueError)]
)
def test_refuses_other_sizes(size, error):
    with pytest.raises(error, match="group_size"):
        bandmf.group_epsilon(dp_sgd(), size)
    with pytest.raises(TypeError, match="plan"):
        bandmf.group_epsilon("plan", 2)
