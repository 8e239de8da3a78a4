"""Random allocation: every example takes part exactly k times in secret rounds of a secret group.

Statistical tests use fixed keys and reject at p < 1e-6, their false-alarm rate over fresh keys.
"""

import itertools
import math

import dp_accounting
import numpy as np
import pytest
from scipy import stats

from keras_bandmf.sampling import draws
from keras_bandmf.sampling.laws.random_allocation import RandomAllocationDraws
from keras_bandmf.sampling.patterns import AllocationInGroup, Rounds
from keras_bandmf.sampling.schedule import Schedule

ALARM = 1e-6


def key_of(seed):
    return np.random.SeedSequence(seed).generate_state(2, np.uint64)


def schedule_of(num_examples, num_steps, num_bands, participations, batch_size=None):
    batch_size = batch_size or round(num_examples * participations / num_steps)
    return Schedule(
        "random_allocation", num_examples, batch_size, num_steps, num_bands, participations
    )


def participation(schedule, key):
    """(num_examples, num_steps) bool: who takes part when."""
    run = schedule.draws(key)
    table = np.zeros((schedule.num_examples, schedule.num_steps), bool)
    for t in range(schedule.num_steps):
        indices = run.indices(t)
        assert indices.dtype == np.int64 and np.all(np.diff(indices) > 0)
        table[indices, t] = True
    return table


@pytest.mark.parametrize(
    "steps, bands, k", [(241, 12, 4), (60, 1, 5), (60, 1, 60), (24, 6, 4), (700, 2, 300), (9, 9, 1)]
)
def test_everybody_takes_part_exactly_k_times_in_rounds_of_one_group(steps, bands, k):
    table = participation(schedule_of(500, steps, bands, k), key_of(1))
    assert np.all(table.sum(axis=1) == k)
    for row in table:
        assert len(set(np.flatnonzero(row) % bands)) == 1


def test_every_pattern_is_as_likely_as_the_accounting_takes_it_to_be():
    # 7 steps in groups of 4 and 3 rounds: 6 and 3 patterns of 2 participations.
    schedule = schedule_of(60_000, 7, 2, 2)
    table = participation(schedule, key_of(2))
    patterns, probabilities = [], []
    law = schedule.law.patterns(schedule)
    for group, weight in enumerate(law.weights()):
        subsets = list(itertools.combinations(range(group, 7, 2), 2))
        patterns += subsets
        probabilities += [weight / len(subsets)] * len(subsets)
    found = [tuple(np.flatnonzero(row).tolist()) for row in table]
    counts = np.array([found.count(pattern) for pattern in patterns])
    assert counts.sum() == 60_000
    assert stats.chisquare(counts, 60_000 * np.array(probabilities)).pvalue > ALARM


def test_large_subsets_are_uniform():
    # Of 12 rounds 6: 924 patterns.
    table = participation(schedule_of(92_400, 12, 1, 6), key_of(3))
    numbers = table @ (1 << np.arange(12))
    counts = np.bincount(numbers, minlength=1 << 12)
    possible = [n for n in range(1 << 12) if n.bit_count() == 6]
    assert counts[possible].sum() == 92_400
    assert stats.chisquare(counts[possible]).pvalue > ALARM


def test_examples_are_independent():
    tables = [participation(schedule_of(4, 6, 2, 1), key_of(seed)) for seed in range(7_200)]
    steps = np.array([table.argmax(axis=1) for table in tables])
    counts = np.zeros((6, 6))
    np.add.at(counts, (steps[:, 0], steps[:, 1]), 1)
    assert stats.chisquare(counts.ravel()).pvalue > ALARM


def test_a_step_is_a_pure_function_of_key_and_step():
    schedule = schedule_of(300, 40, 4, 5)
    first, again, other = (schedule.draws(key_of(seed)) for seed in (4, 4, 5))
    for t in (39, 0, 17, 17):
        np.testing.assert_array_equal(first.indices(t), again.indices(t))
    assert any(not np.array_equal(first.indices(t), other.indices(t)) for t in range(40))


def test_draws_stay_the_same_over_versions_and_machines():
    """A restored run must reallocate nobody: the bits below may never change."""
    run = schedule_of(40, 30, 3, 4).draws(np.array([1, 2**63 + 5], np.uint64))
    assert [run.indices(t).tolist() for t in (0, 29)] == [
        [23],
        [0, 1, 7, 13, 14, 21, 33, 34, 35],
    ]


def test_a_stream_of_bits_serves_one_draw(monkeypatch):
    used = []
    stream = draws.bit_stream

    def record(*arguments):
        used.append(tuple(arguments[1:]))
        return stream(*arguments)

    monkeypatch.setattr(draws, "bit_stream", record)
    RandomAllocationDraws(schedule_of(50, 40, 4, 3), key_of(6))
    # Two passes over the same bits: how many examples a step has, and then which.
    assert used == 2 * [(draws.ALLOCATION, use) for use in range(4)]


def test_the_law_of_the_accounting_has_the_numbers_of_the_schedule():
    schedule = schedule_of(1_500, 241, 12, 4)
    assert schedule.law.patterns(schedule) == AllocationInGroup(Rounds(241, 12), 4)
    assert schedule.adjacency == "add-or-remove-one"
    assert schedule.sensitivity == 1.0
    assert schedule.sampling_probability is None and schedule.separation is None


def test_the_event_gives_all_steps_away():
    schedule = schedule_of(1_500, 240, 12, 4)
    assert schedule.dp_event(3.0) == dp_accounting.GaussianDpEvent(1.5)
    assert schedule.dp_event(3.0, 12) == dp_accounting.GaussianDpEvent(3.0)
    assert schedule.dp_event(3.0, 13) == dp_accounting.GaussianDpEvent(3.0 / math.sqrt(2))
    assert schedule.dp_event(3.0, 0) == dp_accounting.NoOpDpEvent()
    assert [schedule.participations(t) for t in (0, 1, 12, 13, 48, 49, 240)] == [
        0,
        1,
        1,
        2,
        4,
        4,
        4,
    ]


def test_the_expected_batch_counts_what_does_not_divide():
    # 1,000 rows in batches of 300: 3 steps an epoch, so a step has a third of all rows.
    schedule = schedule_of(1_000, 6, 2, 2, batch_size=300)
    assert schedule.expected_batch_size == pytest.approx(1_000 / 3)
    assert schedule.expected_participations == 2.0
    assert "333.334 examples a step on average" in schedule.in_words()
    table = participation(schedule, key_of(7))
    assert table.sum() == 2_000
    sizes = np.bincount([len(schedule.draws(key_of(s)).indices(0)) for s in range(300)])
    beyond = sizes[schedule.padded_size() :].sum()
    assert beyond <= 3  # each with probability 1e-3: more than 3 of 300 with probability 3e-4


@pytest.mark.parametrize(
    "changes, match",
    [
        ({"max_participations": None}, "Plan with `epochs`"),
        ({"min_separation": 3}, "Leave `min_separation` out"),
        ({"num_bands": 61}, "Use at most 60 bands"),
        ({"max_participations": 21}, "Use at most 11 bands"),
        ({"num_bands": 1, "max_participations": 241}, "Use fewer participations"),
        ({"batch_size": 51}, "Use max_participations=8"),
        ({"batch_size": 12}, "Use max_participations=2"),
        ({"max_participations": 0}, "`max_participations` to be an integer of at least 1"),
    ],
)
def test_numbers_that_do_not_fit_together(changes, match):
    numbers = {
        "sampling": "random_allocation",
        "num_examples": 1_500,
        "batch_size": 25,
        "num_steps": 240,
        "num_bands": 12,
        "max_participations": 4,
    }
    Schedule(**numbers)
    with pytest.raises(ValueError, match=match) as error:
        Schedule(**(numbers | changes))
    assert "Received" in str(error.value)
