"""Plans that count units: JSON, fingerprints, statements, and what they refuse."""

import json

import numpy as np
import pytest
import tensorflow as tf

from keras_bandmf import tfx_input
from keras_bandmf.planning.plan import TrainingPlan
from tests.plans import make_plan


def test_a_plan_of_rows_is_written_as_ever():
    fields = json.loads(make_plan().to_json())
    assert "unit" not in fields and fields["version"] == 1
    assert make_plan(unit="example").fingerprint == make_plan().fingerprint


def test_the_unit_goes_through_json_and_changes_the_fingerprint():
    plan = make_plan(unit="user")
    again = TrainingPlan.from_json(plan.to_json())
    assert again == plan and again.unit == "user"
    assert plan.fingerprint != make_plan().fingerprint
    assert plan.fingerprint != make_plan(unit="patient").fingerprint


def test_calibrate_takes_a_unit_and_nothing_else_changes():
    numbers = dict(num_examples=1_000, batch_size=50, epochs=2, epsilon=2.0, delta=1e-5)
    users = TrainingPlan.calibrate(**numbers, num_bands=2, unit="user")
    rows = TrainingPlan.calibrate(**numbers, num_bands=2)
    assert users.unit == "user"
    assert users.noise_multiplier == rows.noise_multiplier
    assert users.epsilon() == rows.epsilon()


def test_a_secret_group_of_users_goes_through_json():
    plan = TrainingPlan.calibrate(
        num_examples=1_000,
        batch_size=100,
        epochs=2,
        epsilon=4.0,
        delta=1e-4,
        num_bands=2,
        amplification="secret_group",
        unit="user",
    )
    again = TrainingPlan.from_json(plan.to_json())
    assert again == plan and again.certificate == plan.certificate


def table_of_users():
    """The plan as a table."""
    return str(make_plan(unit="user"))


def test_statement_and_table_speak_of_the_unit():
    statement = make_plan(unit="user").statement()
    assert statement.unit == "user, with all rows of that user"
    assert "one user, with all rows of that user" in str(statement)
    assert "several rows of one person" not in str(statement)
    assert "two ids of one user" in str(statement) and "one user more or fewer" in str(statement)
    assert "one user is in one of 4 random groups" in statement.sampling
    assert "example" not in statement.sampling and "example" not in table_of_users()
    assert len(statement.not_covered) == len(make_plan().statement().not_covered)
    table = table_of_users()
    assert "units (user)" in table and "one user" in table
    assert "one row" in str(make_plan())


@pytest.mark.parametrize(
    ("unit", "error"),
    [
        (np.arange(3), TypeError),
        (None, TypeError),
        ("", ValueError),
        ("a\nb", ValueError),
        (" user", ValueError),
        ("Example", ValueError),
        ("row", ValueError),
    ],
)
def test_refuses_what_is_no_word(unit, error):
    with pytest.raises(error, match="`unit` to be a word"):
        make_plan(unit=unit)


def test_data_that_the_user_feeds_has_no_units():
    with pytest.raises(ValueError, match="clipped one by one"):
        make_plan(unit="user", sampling="fixed_order", max_participations=3, min_separation=20)


def test_a_stream_has_no_units():
    plan = make_plan(unit="user", sampling="fixed_order")
    stream = tf.data.Dataset.from_tensor_slices(np.zeros(1_000)).batch(50)
    with pytest.raises(ValueError, match="units of the kind 'user'"):
        tfx_input.streamed_batches(stream, plan)


def test_ids_and_unit_are_needed_together():
    x = np.zeros(1_000)
    with pytest.raises(ValueError, match="units of the kind 'user'"):
        make_plan(unit="user").batches(x)
    with pytest.raises(ValueError, match="the plan counts rows"):
        make_plan().batches(x, unit=np.arange(1_000))
    assert make_plan(unit="user").batches(x, unit=np.arange(1_000)).num_examples == 1_000
