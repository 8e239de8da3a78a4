"""One schedule for sampler and accountant: the same object, the same numbers, the same law."""

from fractions import Fraction
from typing import get_args

import numpy as np
import pytest

from keras_bandmf.planning.statement import ADJACENCY_IN_WORDS
from keras_bandmf.sampling import PrivateBatches, StreamedBatches, draws
from keras_bandmf.sampling.laws import LAWS, Adjacency, SamplingName
from keras_bandmf.sampling.schedule import Schedule
from tests.plans import make_plan, make_schedule

KEY = np.array([3, 4], np.uint64)


def test_every_law_is_known_by_its_name_and_to_the_types():
    assert set(LAWS) == set(get_args(SamplingName))
    assert all(name == law.name for name, law in LAWS.items())
    assert {law.adjacency for law in LAWS.values()} <= set(get_args(Adjacency))
    assert set(get_args(Adjacency)) == set(ADJACENCY_IN_WORDS)


@pytest.mark.parametrize("sampling", list(LAWS))
def test_a_plan_gives_the_sampler_the_schedule_that_it_accounts_by(sampling, monkeypatch):
    asked = []
    event_of = Schedule.dp_event

    def record(self, *arguments):
        asked.append(self)
        return event_of(self, *arguments)

    monkeypatch.setattr(Schedule, "dp_event", record)
    plan = make_plan(sampling=sampling)
    plan.epsilon()
    plan.statement()
    batches = plan.batches(np.zeros(1_000), np.zeros(1_000))
    assert asked and all(schedule is plan.schedule for schedule in asked)
    assert batches._schedule is plan.schedule
    drawn = (batches.num_examples, batches.batch_size, batches.num_steps, batches.num_bands)
    assert drawn == (plan.num_examples, plan.batch_size, plan.num_steps, plan.num_bands)
    assert batches.sampling == plan.sampling == plan.schedule.law.name


def test_the_probability_that_is_drawn_by_is_the_one_that_is_charged(monkeypatch):
    schedule = make_schedule(num_examples=401, batch_size=19, num_bands=7, num_steps=70)
    used = []

    def record(bits, count, numerator, denominator):
        used.append(Fraction(numerator, denominator))
        return np.arange(0)

    monkeypatch.setattr(draws, "bernoulli_positions", record)
    schedule.draws(KEY).indices(0)
    assert [float(rate) for rate in used] == [schedule.sampling_probability]
    assert schedule.dp_event(1.0).event.sampling_probability == schedule.sampling_probability


def test_batches_take_a_schedule_only():
    x = np.zeros(1_000)
    numbers = dict(num_examples=1_000, batch_size=50, num_steps=60, num_bands=4)
    with pytest.raises(TypeError):
        PrivateBatches(x, **numbers, sampling="cyclic_poisson", plan_fingerprint="f")
    with pytest.raises(TypeError, match="Expected `schedule` to be the `Schedule` of a plan"):
        PrivateBatches(x, schedule=numbers, plan_fingerprint="f")

    class Other(Schedule):
        """A schedule that draws by other numbers than it accounts for."""

    with pytest.raises(TypeError, match="Expected `schedule`"):
        PrivateBatches(x, schedule=Other("fixed_order", *numbers.values()), plan_fingerprint="f")


def test_batches_refuse_a_declaration_that_they_would_exceed():
    strict = Schedule("fixed_order", 1_000, 50, 60, 4, max_participations=2, min_separation=5)
    with pytest.raises(ValueError, match="take part 3 times, 20 steps apart"):
        PrivateBatches(np.zeros(1_000), schedule=strict, plan_fingerprint="f")
    apart = Schedule("fixed_order", 1_000, 50, 60, 30, max_participations=3, min_separation=30)
    with pytest.raises(ValueError, match="20 steps apart"):
        PrivateBatches(np.zeros(1_000), schedule=apart, plan_fingerprint="f")
    kept = Schedule("fixed_order", 1_000, 50, 60, 4, max_participations=3, min_separation=20)
    assert PrivateBatches(np.zeros(1_000), schedule=kept, plan_fingerprint="f").num_bands == 4


@pytest.mark.parametrize(
    "changes",
    [
        {"sampling": "cyclic_poisson"},
        {"sampling": "fixed_order", "max_participations": 10, "min_separation": 90},
    ],
)
def test_streams_refuse_schedules_that_do_not_follow_from_the_stream(changes):
    with pytest.raises(ValueError, match="in a fixed order and to declare no participations"):
        StreamedBatches(None, schedule=make_schedule(**changes), plan_fingerprint="f")


def test_a_law_without_a_bound_on_participations_reports_none():
    schedule = make_schedule()
    assert (schedule.participations(), schedule.separation) == (None, None)
    fixed = make_schedule(sampling="fixed_order", num_steps=950)
    assert (fixed.participations(), fixed.participations(1), fixed.separation) == (10, 1, 100)
    assert fixed.sampling_probability is None
