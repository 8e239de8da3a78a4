"""Units of privacy: which rows are whose, and which of them take part."""

import numpy as np
import pytest
from scipy import stats

from keras_bandmf.sampling import PrivateBatches
from keras_bandmf.sampling.schedule import Schedule
from keras_bandmf.sampling.units import Units
from tests.sampling.test_batches import batches_of, same

IDS = np.array([7, 3, 7, 7, 9, 3, 7, 7])  # units 0, 1, 2 have the ids 3, 7, 9


def words(count, size, seed=0):
    return np.random.Philox(seed).random_raw(count * size).reshape(count, size)


@pytest.mark.parametrize("ids", [IDS, IDS.astype(str), IDS.astype(object).astype(str), IDS + 2**40])
def test_every_row_belongs_to_the_unit_of_its_id(ids):
    units = Units(ids, 3, 5)
    chosen = units.choose(np.arange(3), words(3, 5))
    expected = [{1, 5}, {0, 2, 3, 6, 7}, {4}]
    for rows, valid, own in zip(chosen.numbers, chosen.valid, expected, strict=True):
        assert set(rows) == own  # padding, too, is of the same unit
        assert sorted(rows[valid]) == sorted(own)
    assert units.num_rows == 8 and units.rows_per_unit == 5


def test_rows_of_a_large_unit_are_a_uniform_subset():
    """Chi-square over the 10 pairs of 5 rows; false-alarm rate 1e-4."""
    units, trials = Units(IDS, 3, 2), 20_000
    chosen = units.choose(np.ones(trials, int), words(trials, 2))
    assert chosen.valid.all()
    assert (chosen.numbers[:, 0] != chosen.numbers[:, 1]).all()
    pairs = np.sort(chosen.numbers, axis=1)
    _, counts = np.unique(pairs, axis=0, return_counts=True)
    assert len(counts) == 10
    assert stats.chisquare(counts).pvalue > 1e-4


def test_thousands_of_rows_and_one_row():
    ids = np.concatenate([np.zeros(5_000, int), np.arange(1, 11)])
    units = Units(ids, 11, 16)
    chosen = units.choose(np.arange(11), words(11, 16))
    assert chosen.valid[0].all() and len(set(chosen.numbers[0])) == 16
    assert chosen.numbers[0].max() < 5_000
    assert (chosen.valid[1:].sum(axis=1) == 1).all()


def test_the_digest_sees_which_row_is_whose():
    one = Units(IDS, 3, 2).digest(b"key")
    assert one == Units(IDS + 1, 3, 2).digest(b"key")  # other names, the same units
    assert one != Units(IDS[::-1], 3, 2).digest(b"key")
    assert one != Units(IDS, 3, 2).digest(b"other")


@pytest.mark.parametrize(
    ("ids", "error", "message"),
    [
        (np.array([0, 1, -1]), ValueError, r"unit\[2\]=.*-1"),
        (np.array(["a", "", "b"]), ValueError, r"unit\[1\]"),
        (np.array([0.0, 1.0, np.nan]), TypeError, "integers or strings"),
        (np.array(["a", None, "b"], object), TypeError, r"unit\[1\]=None"),
        (np.array([1, "a", 2], object), TypeError, "one type"),
        (np.zeros((3, 1), int), ValueError, "vector"),
        ([0, 1, 2], TypeError, "array of ids"),
        (np.ma.masked_array([0, 1, 2], [0, 0, 1]), TypeError, "array of ids"),
        (np.array([0, 1, 1]), ValueError, "2 different ids"),
        (np.array([], int), ValueError, "0 different ids"),
        (np.array(["a", " ", "b"]), ValueError, r"unit\[1\]"),
        (np.array(["a", "a ", "b"]), ValueError, "look alike"),
        (np.array(["\u00e9", "e\u0301", "b"]), ValueError, "look alike"),
    ],
)
def test_refuses_ids_that_are_missing_or_do_not_fit(ids, error, message):
    with pytest.raises(error, match=message):
        Units(ids, 3, 2)


@pytest.mark.parametrize("rows", [0, -1, 1.5, None])
def test_refuses_other_numbers_of_rows(rows):
    with pytest.raises((TypeError, ValueError), match="rows_per_unit"):
        Units(IDS, 3, rows)


UNIT_IDS = np.random.default_rng(0).permutation(np.repeat(np.arange(60), np.arange(60) % 4 + 1))


def unit_batches(**changes):
    options = {"unit": UNIT_IDS, "rows_per_unit": 2, "y": None} | changes
    return batches_of(np.arange(len(UNIT_IDS), dtype="int32"), **options)


@pytest.mark.parametrize("replicas", [1, 2])
def test_a_batch_holds_the_drawn_units_and_at_most_so_many_rows_of_each(replicas):
    made = unit_batches()
    assert made.rows_per_example == 2
    for t in range(24):
        batch = made.batch(t, replicas)
        rows, mask = batch["x"].reshape(-1, 2), batch["mask"].reshape(-1, 2)
        assert len(rows) % (8 * replicas) == 0
        whose = UNIT_IDS[rows]
        assert (whose[:, 0] == whose[:, 1]).all()  # no example holds rows of two units
        drawn = whose[mask.any(axis=1), 0]
        assert sorted(drawn) == sorted(made.indices(t))
        counts = np.bincount(UNIT_IDS)
        np.testing.assert_array_equal(
            mask.sum(axis=1)[mask.any(axis=1)], np.minimum(counts[drawn], 2)
        )
        part = len(rows) // replicas
        for r in range(replicas):
            assert not mask[r * part : (r + 1) * part].any(axis=1).all()  # a sentinel


def test_rows_are_chosen_anew_in_each_step_and_alike_for_any_number_of_replicas():
    made = unit_batches(sampling="fixed_order", batch_size=10)

    def rows(t, replicas):
        batch = made.batch(t, replicas)
        return sorted(batch["x"][batch["mask"]])

    assert rows(0, 1) == rows(0, 2)
    assert sorted(UNIT_IDS[rows(0, 1)]) == sorted(UNIT_IDS[rows(6, 1)])  # the same units
    assert rows(0, 1) != rows(6, 1)  # but other rows
    same(made.batch(3), unit_batches(sampling="fixed_order").batch(3))


def test_a_schedule_that_a_loop_may_use_has_one_row_an_example():
    declared = dict(sampling="fixed_order", batch_size=10, max_participations=4, min_separation=6)
    for options in ({"unit": np.arange(60)}, {"augment": lambda x, seed: x, "augment_copies": 2}):
        with pytest.raises(ValueError, match="clips row by row"):
            PrivateBatches(
                np.arange(60.0),
                schedule=Schedule(num_examples=60, num_steps=24, num_bands=3, **declared),
                plan_fingerprint="print",
                **options,
            )


def test_rows_and_ids_must_agree():
    with pytest.raises(ValueError, match="rows"):
        batches_of(np.arange(10), y=None, unit=UNIT_IDS, rows_per_unit=2)
    with pytest.raises(ValueError, match="`unit` together with `rows_per_unit`"):
        batches_of(rows_per_unit=2)


def test_the_digest_of_batches_includes_the_units():
    swapped = UNIT_IDS.copy()
    swapped[[0, 1]] = swapped[[1, 0]]
    assert unit_batches().digest() == unit_batches().digest()
    assert unit_batches().digest() != unit_batches(unit=swapped).digest()
