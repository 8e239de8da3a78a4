"""Statements: what they say, what they refuse, JSON."""

import copy
import dataclasses
import json
import math
import pickle

import pytest

from keras_bandmf.planning.attacker import AttackerTerms
from keras_bandmf.planning.statement import Statement
from tests.plans import make_plan


def statement(**changes):
    values = {
        "executed": True,
        "mechanism": "per-example clipping, correlated Gaussian noise",
        "epsilon": 1.23456,
        "delta": 1e-6,
        "adjacency": "add-or-remove-one",
        "sampling": "cyclic Poisson at rate 0.1",
        "steps_charged": 80,
        "steps_run": 80,
        "num_steps": 100,
        "num_examples": 1_000,
        "batch_size": 10,
        "num_bands": 4,
        "noise_multiplier": 1.5,
        "l2_norm_clip": 0.5,
        "other_accountants": {"TF Privacy, RDP": 1.4},
        "key_origin": "drawn from the operating system",
        "data": "batches of the plan",
        "caveats": ("metrics were printed",),
        "plan_fingerprint": "ab" * 32,
    }
    return Statement(**{**values, **changes})


def test_str_says_every_fact():
    lines = str(statement()).splitlines()
    text = " ".join(" ".join(lines).split())
    for fact in (
        "1.23456 by the PLD accountant",
        "1.4 by TF Privacy, RDP",
        "1e-06",
        "adding or removing one",
        "one row of the training data",
        "correlated Gaussian noise",
        "cyclic Poisson at rate 0.1",
        "80 run, 80 charged, 100 planned",
        "1000, 10 expected in a batch",
        "multiplier 1.5, correlated over 4 steps",
        "clip norm 0.5",
        "operating system",
        "batches of the plan",
        "metrics were printed",
        "ab" * 32,
        "Caveats:",
        "Not covered:",
        "tuning",
        "preprocessing",
        "metrics and losses",
    ):
        assert fact in text
    assert "NOT PRIVATE" not in text
    assert "planned, not executed" not in text
    assert max(map(len, lines)) <= 88


def test_a_plan_is_headed_as_one():
    planned = statement(executed=False, steps_run=0, l2_norm_clip=None)
    text = str(planned)
    assert text.splitlines()[0] == "Privacy statement: planned, not executed"
    assert "would be (epsilon, delta)" in text
    assert "set when the model is compiled" in " ".join(text.split())


def test_not_private_comes_first():
    withdrawn = statement(private=False, not_private_reason="the seed was fixed")
    text = str(withdrawn)
    assert text.splitlines()[2] == "NOT PRIVATE: the seed was fixed."
    assert "are (epsilon" not in " ".join(text.split())
    assert json.loads(withdrawn.to_json())["private"] is False


def test_without_noise_it_is_not_private_whatever_the_caller_says():
    without = statement(epsilon=math.inf, noise_multiplier=0.0)
    assert not without.private
    assert "NOT PRIVATE" in str(without)
    kept = statement(epsilon=math.inf, private=False, not_private_reason="fixed seed")
    assert kept.not_private_reason == "fixed seed"


def test_zero_out_is_not_called_removal():
    text = " ".join(str(statement(adjacency="zero-out")).split())
    assert "blanking one row" in text
    assert "removing" not in text


def test_numbers_are_printed_on_the_safe_side():
    others = {"TF Privacy, RDP": 1.23456789}
    changes = {"epsilon": 2.00049, "delta": 1.2349e-5, "noise_multiplier": 1.9999999}
    text = str(statement(**changes, l2_norm_clip=0.12345678, other_accountants=others))
    for shown in (
        "epsilon = 2.001 and delta = 1.24e-05",
        "2.00049 by the PLD accountant",
        "1.23457 by TF Privacy, RDP",
        "delta      1.2349e-05",
        "multiplier 1.99999,",
        "clip norm  0.123457",
    ):
        assert shown in text


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"epsilon": math.inf},
        {"private": False, "not_private_reason": "the seed was fixed"},
        {"l2_norm_clip": None, "caveats": (), "plan_fingerprint": None},
        {"epsilon": 0.1 + 0.2, "other_accountants": {"a": math.inf, "b": 1 / 3}},
    ],
)
def test_json_round_trip(changes):
    original = statement(**changes)
    again = Statement.from_json(original.to_json())
    assert again == original
    assert hash(again) == hash(original)
    assert str(again) == str(original)
    json.loads(original.to_json(), parse_constant=lambda name: pytest.fail(name))
    assert pickle.loads(pickle.dumps(original)) == copy.deepcopy(original) == original


def test_json_refuses_the_unknown():
    document = json.loads(statement().to_json())
    for change in (
        {"version": 5},
        {"version": 3},  # with fields that it does not have
        {"attacker": {"mu": 1.0}},
        {"accounted_delta": 2.0},
        {"version": True},
        {"format": "other"},
        {"surprise": 1},
        {"other_accountants": [1]},
        {"epsilon": "much"},
        {"epsilon": -1},
        {"steps_run": 80.5},
    ):
        with pytest.raises((ValueError, TypeError)):
            Statement.from_json(json.dumps({**document, **change}))
    del document["delta"]
    with pytest.raises(ValueError, match=r"missing \['delta'\]"):
        Statement.from_json(json.dumps(document))
    for text in ("", "[]", "{", "null", '{"format": NaN}'):
        with pytest.raises(ValueError):
            Statement.from_json(text)
    with pytest.raises(TypeError):
        Statement.from_json(None)


@pytest.mark.parametrize(
    "changes",
    [
        {"executed": 1},
        {"mechanism": ""},
        {"data": None},
        {"epsilon": math.nan},
        {"epsilon": -0.1},
        {"delta": 0.0},
        {"delta": 1.0},
        {"adjacency": "replace-one"},
        {"steps_charged": 101},
        {"steps_run": 81},  # more than was charged
        {"steps_run": -1},
        {"num_steps": 0},
        {"noise_multiplier": -1.0},
        {"l2_norm_clip": 0.0},
        {"caveats": "one string"},
        {"not_covered": (1,)},
        {"other_accountants": {"x": -1.0}},
        {"private": False},
        {"private": True, "not_private_reason": "but"},
    ],
)
def test_bad_facts_are_refused(changes):
    with pytest.raises(ValueError, match="Received: "):
        statement(**changes)


def test_it_is_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        statement().epsilon = 0.1


def test_the_number_of_rows_is_said_to_be_public():
    text = " ".join(str(statement()).split())
    assert "the number of rows, num_examples: treated as public" in text
    assert "a run on any number of rows other than num_examples is refused" in text


def test_the_attacker_is_in_the_statement_and_its_json():
    planned = make_plan().statement()
    assert planned.attacker.mu > 0 and len(planned.attacker.epsilons) == 5
    assert dict(planned.attacker.epsilons)[planned.delta] == planned.epsilon
    assert planned.accounted_delta == planned.delta * (1 - 1e-3)
    assert Statement.from_json(planned.to_json()) == planned
    text = " ".join(str(planned).split())
    assert "% at 0.1 %" in text and "of Gaussian privacy, up to delta" in text
    assert make_plan(noise_multiplier=0.0).statement().attacker is None
    assert make_plan().statement(steps=0).attacker is None


def test_statements_of_earlier_releases_are_read():
    document = json.loads(make_plan().statement().to_json())
    del document["attacker"], document["accounted_delta"], document["noise_tail"]
    with pytest.raises(ValueError, match="attacker"):
        Statement.from_json(json.dumps(document))
    old = Statement.from_json(json.dumps(document | {"version": 3}))
    assert old.attacker is None and old.epsilon == make_plan().epsilon()
    assert json.loads(old.to_json())["version"] == 4


def test_what_an_attacker_can_do_is_printed_on_the_safe_side():
    terms = AttackerTerms(
        mu=0.123401,
        true_positive_rates=((0.001, 0.00123401),),
        epsilons=((1.0001e-5, 2.000101),),
    )
    rates, mu, deltas = (text for _, text in terms.rows())
    assert "0.124 % at 0.1 %" in rates
    assert mu.startswith("0.1235,")
    assert deltas == "epsilon 2.001 at 1.1e-05"
