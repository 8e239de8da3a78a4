"""The law of the draws, their purity, and the separation of participations.

Statistical tests use fixed keys and reject at p < 1e-6, their false-alarm rate over fresh keys.
"""

import hashlib
from fractions import Fraction

import numpy as np
import pytest
from scipy import stats

from keras_bandmf.sampling import draws
from keras_bandmf.sampling.draws import bernoulli_positions, bit_stream, round_up
from keras_bandmf.sampling.schedule import Schedule

ALARM = 1e-6


def key_of(seed):
    return np.random.SeedSequence(seed).generate_state(2, np.uint64)


def rule_of(**changes):
    numbers = dict(num_examples=400, batch_size=20, num_steps=4000, num_bands=4)
    return Schedule(**(numbers | {"sampling": "cyclic_poisson"} | changes))


def participation(rule, key, num_steps=None):
    """(num_steps, num_examples) bool: who takes part when."""
    run = rule.draws(key)
    table = np.zeros((num_steps or rule.num_steps, rule.num_examples), bool)
    for t in range(len(table)):
        indices = run.indices(t)
        assert indices.dtype == np.int64
        table[t, indices] = True
        assert table[t].sum() == len(indices), "an example was drawn twice"
    return table


def groups(rule, key):
    """Group of each example, read off a run at rate one."""
    batch_size = rule.num_examples // rule.num_bands
    whole = Schedule(
        "cyclic_poisson", rule.num_examples, batch_size, rule.num_bands, rule.num_bands
    )
    table = participation(whole, key)
    assert np.all(table.sum(axis=0) == 1)
    return table.argmax(axis=0)


def two_sided(statistic, dof):
    return 2 * min(stats.chi2.cdf(statistic, dof), stats.chi2.sf(statistic, dof))


@pytest.mark.parametrize("num_bands", [2, 3, 7, 16])
def test_groups_are_uniform(num_bands):
    rule = rule_of(num_examples=12_600 - 12_600 % num_bands, num_bands=num_bands, batch_size=1)
    counts = np.bincount(groups(rule, key_of(3)), minlength=num_bands)
    assert stats.chisquare(counts).pvalue > ALARM


def test_groups_are_independent_draws_and_not_a_partition_into_equal_parts():
    rule = rule_of(num_examples=12, num_bands=3, batch_size=1)
    drawn = np.array([groups(rule, key_of(seed)) for seed in range(3000)])
    pairs = np.bincount(drawn[:, 0] * 3 + drawn[:, 1], minlength=9)
    assert stats.chisquare(pairs).pvalue > ALARM
    sizes = np.bincount(np.minimum((drawn == 0).sum(axis=1), 9), minlength=10)
    expected = np.append(stats.binom.pmf(np.arange(9), 12, 1 / 3), stats.binom.sf(8, 12, 1 / 3))
    assert stats.chisquare(sizes, 3000 * expected).pvalue > ALARM


def test_the_group_of_an_example_never_changes_during_a_run():
    rule = rule_of(num_bands=5, num_steps=2000)
    table = participation(rule, key_of(5))
    for example in range(rule.num_examples):
        steps = np.flatnonzero(table[:, example])
        assert len(set(steps % 5)) <= 1
        assert np.all(np.diff(steps) >= 5)
    assert table.sum() > 30_000


def test_inclusion_is_bernoulli_of_the_rate_for_every_member():
    rule = rule_of()
    table = participation(rule, key_of(7))
    visits, rate = rule.num_steps // rule.num_bands, 0.2
    counts = table.sum(axis=0)
    statistic = ((counts - visits * rate) ** 2).sum() / (visits * rate * (1 - rate))
    assert two_sided(statistic, rule.num_examples) > ALARM


def test_inclusions_of_a_step_are_independent():
    """The batch size is Binomial(group size, rate); without replacement it would be constant."""
    rule = rule_of()
    table = participation(rule, key_of(8))
    member_counts = np.bincount(groups(rule_of(num_examples=400), key_of(8)), minlength=4)
    size = member_counts[np.arange(rule.num_steps) % 4]
    statistic = ((table.sum(axis=1) - 0.2 * size) ** 2 / (size * 0.2 * 0.8)).sum()
    assert two_sided(statistic, rule.num_steps) > ALARM


def test_successive_visits_of_a_group_are_independent():
    rule = rule_of()
    table = participation(rule, key_of(9))
    example_group = groups(rule_of(), key_of(9))
    cells = np.zeros(4)
    for group in range(4):
        visits = table[group::4, example_group == group]
        now, then = visits[:-1:2], visits[1::2]
        cells += np.bincount((2 * now + then).ravel(), minlength=4)
    expected = cells.sum() * np.array([0.64, 0.16, 0.16, 0.04])
    assert stats.chisquare(cells, expected, ddof=0).pvalue > ALARM


def test_the_same_step_under_other_keys_is_independent_of_the_example():
    rule = rule_of(num_examples=50, batch_size=10, num_bands=2, num_steps=2)
    counts = sum(participation(rule, key_of(seed))[1] for seed in range(2000))
    statistic = ((counts - 400.0) ** 2).sum() / (2000 * 0.2 * 0.8)
    assert two_sided(statistic, 50) > ALARM


def test_one_band_is_plain_poisson_and_rate_one_takes_the_whole_group():
    table = participation(rule_of(num_bands=1, num_steps=500), key_of(1))
    assert abs(table.mean() - 0.05) < 5 * np.sqrt(0.05 * 0.95 / table.size)
    whole = rule_of(num_bands=20, num_steps=60)
    table = participation(whole, key_of(1))
    np.testing.assert_array_equal(table[:20], table[20:40])
    assert np.all(table[:20].sum(axis=0) == 1)


def test_a_step_is_a_pure_function_of_rule_key_and_step():
    rule = rule_of()
    forward, backward = rule.draws(key_of(2)), rule.draws(key_of(2))
    once = [forward.indices(t) for t in range(40)]
    again = [backward.indices(t) for t in reversed(range(40))][::-1]
    for ours, theirs in zip(once, again, strict=True):
        np.testing.assert_array_equal(ours, theirs)
    longer = rule_of(num_steps=10**9).draws(key_of(2))
    np.testing.assert_array_equal(longer.indices(17), once[17])
    other = rule.draws(key_of(3))
    assert not np.array_equal(other.indices(17), once[17])
    assert not np.array_equal(once[17], once[17 + 4])


@pytest.mark.parametrize("sampling", ["cyclic_poisson", "fixed_order"])
def test_draws_stay_the_same_over_versions_and_machines(sampling):
    """A restored run must regroup nobody: the bits below may never change."""
    run = rule_of(sampling=sampling).draws(np.array([1, 2**63 + 5], np.uint64))
    text = b"".join(run.indices(t).astype("<i8").tobytes() for t in (0, 1, 2, 999, 3999))
    digest = {"cyclic_poisson": "6003d46e5e5e9ce7", "fixed_order": "02e980949f4df9de"}
    assert hashlib.sha256(text).hexdigest()[:16] == digest[sampling]


def test_the_rate_comes_from_public_numbers_alone(monkeypatch):
    """Never from the size of the group that was drawn."""
    rates = []

    def record(bits, count, numerator, denominator):
        rates.append(Fraction(numerator, denominator))
        return bernoulli_positions(bits, count, numerator, denominator)

    monkeypatch.setattr(draws, "bernoulli_positions", record)
    participation(rule_of(num_examples=401, batch_size=19, num_bands=7), key_of(1), 14)
    assert rates == [Fraction(7 * 19, 401)] * 14


@pytest.mark.parametrize("sampling", ["cyclic_poisson", "fixed_order"])
def test_no_bits_are_used_twice(sampling, monkeypatch):
    used = []

    def record(*arguments):
        stream = bit_stream(*arguments)
        used.append(tuple(stream.state["state"]["counter"].tolist()))
        return stream

    monkeypatch.setattr(draws, "bit_stream", record)
    participation(rule_of(sampling=sampling), key_of(1), 20)
    # The groups are drawn in two passes over the same bits: the sizes first.
    assert len(used) == (22 if sampling == "cyclic_poisson" else 1)
    assert len({counter[2:] for counter in used}) == (21 if sampling == "cyclic_poisson" else 1)
    assert all(counter[:2] == (0, 0) for counter in used)


class _Words:
    """A bit generator that hands out given words."""

    def __init__(self, words):
        self._words = np.asarray(words, np.uint64)

    def random_raw(self, count):
        taken, self._words = self._words[:count], self._words[count:]
        assert len(taken) == count
        return taken


def test_bernoulli_compares_sixty_four_exact_bits():
    """Head of 16 and tail of 48 bits together decide as the whole number would."""
    threshold = (0x1234 << 48) + 77
    heads = [0x1233, 0x1234, 0x1235, 0x1234, 0x1234, 0, 0xFFFF, 0x1234]
    tails = [76, 77, 78, 0]
    words = np.array(heads, "<u2").view("<u8").astype(np.uint64)
    bits = _Words([*words, *(np.array(tails, np.uint64) << np.uint64(16))])
    numbers, rest = [], iter(tails)
    for head in heads:
        numbers.append((head << 48) + (next(rest) if head == 0x1234 else 0))
    got = bernoulli_positions(bits, len(heads), threshold, 1 << 64)
    assert got.tolist() == [i for i, number in enumerate(numbers) if number < threshold]
    assert got.tolist() == [0, 1, 5, 7]


@pytest.mark.parametrize("numerator, denominator", [(1, 2**18), (1, 3), (65535, 65536), (5, 7)])
def test_bernoulli_counts(numerator, denominator):
    bits = np.random.Philox(key=np.array([4, 4], np.uint64))
    count = 1_000_003
    got = len(bernoulli_positions(bits, count, numerator, denominator))
    law = stats.binom(count, numerator / denominator)
    assert min(law.cdf(got), law.sf(got - 1)) > ALARM


def test_bernoulli_of_rate_one_and_of_nobody():
    bits = np.random.Philox(key=np.array([4, 4], np.uint64))
    assert bernoulli_positions(bits, 5, 3, 3).tolist() == [0, 1, 2, 3, 4]
    assert bernoulli_positions(bits, 0, 1, 3).tolist() == []


def test_fixed_order_has_the_separation_of_an_epoch_exactly():
    rule = rule_of(num_examples=103, batch_size=10, num_steps=55, sampling="fixed_order")
    table = participation(rule, key_of(1))
    assert np.all(table.sum(axis=1) == 10)
    taking_part = table.any(axis=0)
    assert taking_part.sum() == 100
    for example in np.flatnonzero(taking_part):
        assert set(np.diff(np.flatnonzero(table[:, example]))) == {10}
    assert not np.array_equal(rule.draws(key_of(1)).indices(0), rule.draws(key_of(2)).indices(0))


def test_fixed_order_permutation_is_uniform():
    rule = rule_of(num_examples=12, batch_size=3, num_bands=1, num_steps=4, sampling="fixed_order")
    counts = sum(participation(rule, key_of(seed)).astype(int) for seed in range(3000))
    assert stats.chisquare(counts.ravel(), np.full(48, 750)).pvalue > ALARM


@pytest.mark.parametrize("replicas", [1, 2, 3])
def test_padded_size(replicas):
    rule = rule_of(num_examples=60_000, batch_size=600)
    size = rule.padded_size(replicas)
    assert size % (8 * replicas) == 0
    assert stats.binom.cdf(size - replicas, 60_000, 0.01) >= 0.999
    assert stats.binom.cdf(size - 9 * replicas, 60_000, 0.01) < 0.999
    few = rule.padded_sizes(replicas)
    assert len(few) == 2 and few[-1] == size and few[0] % (8 * replicas) == 0
    assert 0.7 <= stats.binom.cdf(few[0] - replicas, 60_000, 0.01) < 0.9
    fixed = rule_of(batch_size=20, sampling="fixed_order").padded_size(replicas)
    assert fixed == round_up(20 + replicas, replicas) and replicas <= fixed - 20 < 2 * replicas


def test_batch_sizes_exceed_the_padded_size_as_rarely_as_stated():
    rule = rule_of(num_examples=2000, batch_size=100, num_bands=4, num_steps=4)
    size = int(stats.binom.ppf(0.999, 2000, 0.05))
    over = sum(len(rule.draws(key_of(s)).indices(t)) > size for s in range(1000) for t in range(4))
    assert stats.binom.sf(over - 1, 4000, 0.001) > ALARM


@pytest.mark.parametrize(
    "change, error, match",
    [
        (dict(num_examples=0), ValueError, "num_examples"),
        (dict(num_examples=3.0), TypeError, "num_examples=3.0"),
        (dict(batch_size=True), TypeError, "batch_size"),
        (dict(batch_size=401), ValueError, "batch_size=401"),
        (dict(num_steps=-1), ValueError, "num_steps=-1"),
        (dict(num_bands="4"), TypeError, "num_bands"),
        (dict(num_bands=21), ValueError, "at most 20 bands"),
        (dict(num_bands=21, sampling="fixed_order"), ValueError, "at most 20 bands"),
        (dict(sampling="shuffle"), ValueError, "sampling='shuffle'"),
    ],
)
def test_bad_numbers(change, error, match):
    with pytest.raises(error, match=match):
        rule_of(**change)


def test_bad_number_of_replicas():
    with pytest.raises(ValueError, match="num_replicas"):
        rule_of().padded_size(0)
