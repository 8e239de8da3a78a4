"""Reports say what was found, round to the safe side, and survive a file."""

import math

import numpy as np
import pytest

from keras_bandmf.audit import AuditReport


def make(**changes):
    facts = {
        "kind": "step",
        "attack": "matched filter",
        "epsilon_lower_bound": 1.23456,
        "epsilon": 4.0,
        "delta": 1e-5,
        "confidence": 0.95,
        "scores_in": np.array([3.0, 1.0]),
        "scores_out": np.array([0.0, 2.0]),
    }
    return AuditReport(**(facts | changes))


def test_the_bound_is_rounded_down():
    assert "at least 1.234 at" in str(make())


def test_a_bound_above_epsilon_is_a_contradiction():
    report = make(epsilon=1.0)
    assert not report.consistent
    assert "FALSE" in str(report)


def test_a_contradicted_claim_is_named():
    report = make(contradicted=(0.5, 0.1))
    assert not report.consistent
    assert "epsilon = 0.5 at delta = 0.1" in str(report).replace("\n", " ")


def test_roc_counts_scores_from_the_highest_down():
    false, true = make().roc()
    np.testing.assert_array_equal(false, [0, 0, 0.5, 0.5, 1])
    np.testing.assert_array_equal(true, [0, 0.5, 0.5, 1, 1])


@pytest.mark.parametrize("changes", [{}, {"epsilon": math.inf}, {"contradicted": (0.5, 0.1)}])
def test_json_round_trip(changes):
    report = make(**changes)
    again = AuditReport.from_json(report.to_json())
    assert again == report and hash(again) == hash(report)
    assert again != make(attack="another")


@pytest.mark.parametrize("name", ["delta", "confidence"])
def test_numbers_out_of_range_are_refused(name):
    with pytest.raises(ValueError, match=name):
        make(**{name: 1.5})


def test_a_document_of_another_kind_is_refused():
    with pytest.raises(ValueError, match="AuditReport"):
        AuditReport.from_json("{}")
