"""Plans that count the group of every example as secret."""

import dataclasses
import json

import numpy as np
import pytest

import keras_bandmf as bandmf
from keras_bandmf.accounting.accountant import epsilon_of
from keras_bandmf.accounting.amplification.certificate import OutOfReach
from keras_bandmf.planning import calibration, secret_group
from keras_bandmf.planning.plan_report import SECRET_GROUPS
from keras_bandmf.record.composition import compose
from keras_bandmf.strategies import BandedStrategy, BlockDiagonalStrategy, ToeplitzStrategy
from keras_bandmf.strategies.coefficients import fractional_coefficients
from tests.accounting.amplification import reference

RUN = {"num_examples": 400, "batch_size": 20, "num_steps": 24, "delta": 1e-4}


@pytest.fixture(scope="module")
def plan():
    return bandmf.TrainingPlan.calibrate(
        **RUN, num_bands=4, epsilon=2.0, amplification="secret_group"
    )


def test_it_needs_less_noise_for_the_same_epsilon(plan):
    known = bandmf.TrainingPlan.calibrate(**RUN, num_bands=4, epsilon=2.0)
    assert plan.noise_multiplier < 0.97 * known.noise_multiplier
    assert plan.expected_rmse < known.expected_rmse
    assert plan.epsilon() == 2.0
    assert epsilon_of(plan.dp_event(), plan.delta) > 2.0
    assert known.certificate is None


def test_the_epsilon_is_true_by_enumeration(plan):
    columns = secret_group.columns_of(plan.strategy)
    # 24 steps in 4 groups of 6 rounds: 256 patterns.
    probabilities, vectors = reference.patterns("poisson", 24, 4, plan.sampling_probability)
    found = reference.plain_deltas(
        reference.dense(columns), probabilities, vectors, plan.noise_multiplier, 2.0, 200_000, 3
    )
    # Five standard errors: it fails by chance with probability 3e-7.
    for mean, error in found:
        assert mean - 5 * error <= plan.delta
    assert found[0][0] + 5 * found[0][1] > 0.5 * plan.delta  # and no more noise than needed


def test_the_first_steps_cost_no_more_than_all(plan):
    assert plan.epsilon(0) == 0.0
    assert plan.epsilon(4) < plan.epsilon(8) <= plan.epsilon(24) == 2.0
    assert plan.epsilon(23) == 2.0  # by the group known it would be more


def test_json_keeps_what_was_certified(plan):
    text = plan.to_json()
    again = bandmf.TrainingPlan.from_json(text)
    assert again == plan and again.certificate == plan.certificate
    assert again.epsilon() == 2.0
    assert json.loads(text)["version"] == 2


def test_plans_without_a_certificate_are_written_as_before():
    plan = bandmf.TrainingPlan(**RUN, num_bands=4, noise_multiplier=1.0)
    document = json.loads(plan.to_json())
    assert document["version"] == 1 and "certificate" not in document


@pytest.mark.parametrize(
    "change",
    [
        {"noise_multiplier": 0.9},
        {"delta": 1e-5},
        {"batch_size": 22},
        {"certificate": {"epsilon": 1.5}},
        {"certificate": {"attempt": -20}},
        {"certificate": {"samples": [20_000, 20_000]}},
        {"certificate": {"samples": [200_000, 200_000]}},
        {"certificate": {"failure": 1e-12}},
    ],
)
def test_a_changed_plan_states_no_epsilon(plan, change):
    document = json.loads(plan.to_json())
    for name, value in change.items():
        document[name] = document[name] | value if isinstance(value, dict) else value
    with pytest.raises(ValueError, match="[Cc]ertificate|at least 0"):
        bandmf.TrainingPlan.from_json(json.dumps(document)).statement()


def test_more_noise_than_was_certified_is_fine(plan):
    more = bandmf.TrainingPlan(
        **RUN,
        strategy=plan.strategy,
        noise_multiplier=1.5 * plan.noise_multiplier,
        certificate=plan.certificate,
    )
    assert more.epsilon() < 2.0  # the group known: the smaller of both is stated


def test_the_statement_says_what_was_counted(plan):
    text = str(plan.statement())
    assert "by the Monte Carlo (secret groups) accountant" in text
    assert "by known group" in text
    assert "is false with probability at most 1e-07" in " ".join(text.split())
    nothing = plan.statement(0)
    assert nothing.epsilon == 0.0 and "Monte Carlo" not in str(nothing)


def test_a_stated_epsilon_of_several_runs_counts_groups_as_known(plan):
    statement = dataclasses.replace(
        plan.statement(), executed=True, run_id="one", steps_run=24, key_origin="here"
    )
    both = compose([statement, dataclasses.replace(statement, run_id="two")])
    assert both.epsilon > 2.0
    assert not any(caveat.startswith(SECRET_GROUPS) for caveat in both.caveats)
    assert any("as if the random group" in caveat for caveat in both.caveats)


def test_where_nothing_can_be_certified_groups_are_known():
    with pytest.warns(UserWarning, match="Groups are counted as known"):
        plan = bandmf.TrainingPlan.calibrate(
            **RUN | {"delta": 1e-60}, num_bands=4, epsilon=1.0, amplification="secret_group"
        )
    assert plan.certificate is None and plan.epsilon() <= 1.0


def test_a_failed_certificate_leaves_the_best_plan_of_known_groups(monkeypatch):
    def out_of_reach(*arguments):
        raise OutOfReach("out of reach")

    known = bandmf.TrainingPlan.calibrate(**RUN, epsilon=2.0)
    monkeypatch.setattr(calibration, "certified_noise", out_of_reach)
    with pytest.warns(UserWarning, match="Groups are counted as known"):
        plan = bandmf.TrainingPlan.calibrate(**RUN, epsilon=2.0, amplification="secret_group")
    assert plan == known


def test_a_certificate_must_be_one_of_the_plan(plan):
    for change in ({"delta": 1e-6}, {"noise_multiplier": 0.0}):
        with pytest.raises(bandmf.PrivacyError, match="certificate=None"):
            arguments = {"noise_multiplier": plan.noise_multiplier, **RUN, **change}
            bandmf.TrainingPlan(**arguments, strategy=plan.strategy, certificate=plan.certificate)


def test_noise_covers_the_rounding_of_its_rows(plan):
    small, large = (
        secret_group.rounding_factor(plan.strategy, 1.1, 1.0, size) for size in (10**3, 10**9)
    )
    assert 1.0 < small < 1.0 + 1e-8 < large < 1.001
    assert secret_group.rounding_factor(plan.strategy, 0.0, 1.0, 100) == 1.0


def test_bands_and_coefficients_are_chosen_together():
    known = bandmf.TrainingPlan.calibrate(**RUN, epsilon=2.0)
    secret = bandmf.TrainingPlan.calibrate(**RUN, epsilon=2.0, amplification="secret_group")
    assert secret.num_bands >= known.num_bands
    assert secret.expected_rmse < known.expected_rmse
    assert secret.epsilon() <= 2.0


def test_nothing_is_secret_with_one_band():
    plan = bandmf.TrainingPlan.calibrate(
        **RUN, num_bands=1, epsilon=2.0, amplification="secret_group"
    )
    assert plan.certificate is None


def test_what_has_no_secret_groups_is_refused():
    with pytest.raises(ValueError, match="are not secret"):
        bandmf.TrainingPlan.calibrate(
            **RUN, epsilon=2.0, sampling="fixed_order", amplification="secret_group"
        )
    with pytest.raises(ValueError, match="amplification"):
        bandmf.TrainingPlan.calibrate(**RUN, epsilon=2.0, amplification="hidden")
    with pytest.raises(TypeError, match="certificate"):
        bandmf.TrainingPlan(**RUN, num_bands=4, noise_multiplier=1.0, certificate="yes")


@pytest.mark.parametrize(
    "strategy",
    [
        ToeplitzStrategy.optimize(num_steps=12, num_bands=4),
        ToeplitzStrategy(fractional_coefficients(0.4, 5), 12),
        BandedStrategy.optimize(num_steps=12, num_bands=3),
        BlockDiagonalStrategy.optimize(num_steps=12, num_bands=3, block_steps=4),
    ],
    ids=["toeplitz", "fractional", "banded", "blocks"],
)
def test_columns_are_those_of_the_matrix(strategy):
    columns = secret_group.columns_of(strategy)
    expected = strategy.materialize() / strategy.sensitivity()
    np.testing.assert_allclose(reference.dense(columns), expected, atol=1e-14)


def test_half_is_the_square_root():
    found = ToeplitzStrategy(fractional_coefficients(0.5, 6), 20)
    expected = ToeplitzStrategy.square_root(num_steps=20, num_bands=6)
    np.testing.assert_allclose(found.materialize(), expected.materialize(), atol=1e-14)
    # The power series by itself: the square of that of 1/4 is that of 1/2.
    quarter = fractional_coefficients(0.25, 6)
    np.testing.assert_allclose(
        np.convolve(quarter, quarter)[:6], fractional_coefficients(0.5, 6), rtol=1e-14
    )


def test_the_record_of_a_certificate_goes_through_its_config(plan):
    config = plan.certificate.get_config()
    assert type(plan.certificate).from_config(json.loads(json.dumps(config))) == plan.certificate
    for broken in (None, {}, {**config, "more": 1}, {**config, "samples": 5}):
        with pytest.raises(ValueError, match="Received"):
            type(plan.certificate).from_config(broken)
    assert dataclasses.replace(plan.certificate, attempt=1) != plan.certificate


@pytest.mark.parametrize("bands", [1, 4])
def test_random_allocation_is_certified_by_default(bands):
    run = {**RUN, "sampling": "random_allocation", "max_participations": 2}
    plan = bandmf.TrainingPlan.calibrate(**run, num_bands=bands, epsilon=2.0)
    assert plan.epsilon() == 2.0 and plan.certificate is not None
    probabilities, vectors = reference.patterns("allocation", 24, bands, 2)
    found = reference.plain_deltas(
        reference.dense(secret_group.columns_of(plan.strategy)),
        probabilities,
        vectors,
        plan.noise_multiplier,
        2.0,
        60_000,
        3,
    )
    # Five standard errors: it fails by chance with probability 3e-7.
    for mean, error in found:
        assert mean - 5 * error <= plan.delta
    assert max(mean + 5 * error for mean, error in found) > 0.4 * plan.delta
    # All steps known: far more noise.
    known = bandmf.TrainingPlan.calibrate(
        **run, num_bands=bands, epsilon=2.0, amplification="known_group"
    )
    assert known.certificate is None
    assert plan.noise_multiplier < 0.7 * known.noise_multiplier
    again = bandmf.TrainingPlan.from_json(plan.to_json())
    assert again == plan and again.epsilon() == 2.0


def test_the_participations_of_random_allocation_are_the_epochs():
    run = {"num_examples": 410, "batch_size": 20, "noise_multiplier": 1.0, "delta": 1e-4}
    plan = bandmf.TrainingPlan(**run, epochs=2, num_bands=4, sampling="random_allocation")
    assert plan.max_participations == plan.participations == 2
    assert plan.schedule.expected_batch_size == pytest.approx(20.5)
    assert not plan.declares_participations
    with pytest.raises(ValueError, match="Plan with `epochs`"):
        bandmf.TrainingPlan(**run, num_steps=40, num_bands=4, sampling="random_allocation")


def test_another_law_in_the_json_is_not_confirmed():
    # The certificate of exactly two participations says nothing of Poisson sampling.
    plan = bandmf.TrainingPlan.calibrate(
        **RUN, num_bands=4, epsilon=2.0, sampling="random_allocation", max_participations=2
    )
    document = json.loads(plan.to_json()) | {
        "sampling": "cyclic_poisson",
        "max_participations": None,
        "batch_size": 35,
    }
    changed = bandmf.TrainingPlan.from_json(json.dumps(document))
    assert changed.schedule.expected_participations == pytest.approx(2.1)
    with pytest.raises(ValueError, match="not confirmed"):
        changed.statement()


def test_what_cannot_be_certified_under_random_allocation_is_refused():
    with pytest.raises(OutOfReach, match="hours"):
        bandmf.TrainingPlan.calibrate(
            num_examples=1_000_000,
            batch_size=10,
            epochs=20,
            num_bands=100,
            epsilon=1.0,
            delta=1e-6,
            sampling="random_allocation",
        )


@pytest.mark.slow
def test_auto_takes_the_law_of_lowest_error():
    run = {"num_examples": 400, "batch_size": 20, "epochs": 2, "delta": 1e-4, "num_bands": 4}
    arguments = {"epsilon": 2.0, "sampling": "auto", "amplification": "secret_group"}
    found = bandmf.TrainingPlan.calibrate(**run, **arguments)
    assert found.sampling == "random_allocation" and found.epsilon() == 2.0
    known = bandmf.TrainingPlan.calibrate(**run, epsilon=2.0, sampling="auto")
    assert known.sampling != "random_allocation"
    assert found.expected_rmse < known.expected_rmse


def test_auto_goes_on_where_nothing_can_be_certified(monkeypatch):
    def refuse(*arguments):
        raise OutOfReach("Too many steps.")

    monkeypatch.setattr(calibration, "certified_noise", refuse)
    run = {"num_examples": 400, "batch_size": 20, "epochs": 2, "delta": 1e-4, "num_bands": 4}
    with pytest.warns(UserWarning, match="Random allocation is not considered. Too many steps"):
        found = bandmf.TrainingPlan.calibrate(
            **run, epsilon=2.0, sampling="auto", amplification="secret_group"
        )
    assert found == bandmf.TrainingPlan.calibrate(**run, epsilon=2.0, sampling="auto")


@pytest.mark.parametrize(
    "changes, bands",
    [
        # The bands of cyclic Poisson sampling would be too many.
        ({"num_steps": 10, "max_participations": 2}, None),
        # These bands exist under this law only.
        ({"num_steps": 20, "max_participations": 1, "num_bands": 20}, 20),
        # Where the add direction is far below everything.
        ({"num_steps": 10, "max_participations": 1, "num_bands": 1}, 1),
    ],
)
def test_random_allocation_has_bands_of_its_own(changes, bands):
    run = {"num_examples": 1_000, "batch_size": 100, "epsilon": 8.0, "delta": 1e-4}
    plan = bandmf.TrainingPlan.calibrate(**run, **changes, sampling="random_allocation")
    assert plan.certificate is not None and plan.epsilon() == 8.0
    assert bands is None or plan.num_bands == bands


@pytest.mark.slow
def test_the_search_climbs_out_of_too_little_noise():
    run = {**RUN, "num_bands": 4, "max_participations": 2, "sampling": "random_allocation"}
    small, large = (
        bandmf.TrainingPlan.calibrate(**(run | {"batch_size": size}), epsilon=50.0)
        for size in (20, 33)
    )
    # The batch size that is asked for is no part of this law.
    assert small.noise_multiplier == pytest.approx(large.noise_multiplier, rel=0.01)


def test_auto_leaves_out_what_cannot_be_scheduled():
    plan = bandmf.TrainingPlan.calibrate(
        **RUN, num_bands=4, epsilon=2.0, sampling="auto", amplification="secret_group"
    )
    assert plan.sampling != "random_allocation" and plan.certificate is None


def test_a_rare_batch_has_a_statement():
    plan = bandmf.TrainingPlan(
        num_examples=10,
        batch_size=1,
        num_steps=20,
        max_participations=1,
        num_bands=1,
        noise_multiplier=1.0,
        delta=1e-5,
        sampling="random_allocation",
    )
    assert plan.statement().batch_size == 1 and plan.schedule.expected_batch_size == 0.5
