"""The likelihood ratios of the laws against patterns that are enumerated."""

import numpy as np
import pytest
import tensorflow as tf

from keras_bandmf.sampling.patterns import (
    AllocationInGroup,
    Rounds,
    log_mixed_product,
)
from tests.accounting.amplification import reference

CASES = [
    ("poisson", 7, 3, 0.3),
    ("poisson", 6, 1, 0.2),
    ("poisson", 5, 2, 1.0),
    ("allocation", 7, 3, 2),
    ("allocation", 8, 1, 3),
    ("allocation", 6, 2, 3),
    ("allocation", 5, 5, 1),
]


def log_ratio(law, log_u):
    """log L of `log u_i`, shape (samples, n)."""
    rounds = law.rounds
    table = np.zeros((rounds.most * rounds.num_bands, len(log_u)))
    table[: rounds.num_steps] = log_u.T
    # What stands in places that are no steps must not count.
    table[rounds.num_steps :] = 3.0
    table = tf.constant(table.reshape(rounds.most, rounds.num_bands, len(log_u)))
    of_group = law.log_ratio(table).numpy()
    return np.logaddexp.reduce(of_group + np.log(law.weights())[:, None], axis=0)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("spread", [0.1, 2.0, 20.0])
def test_ratios_are_those_of_enumerated_patterns(case, spread):
    law = reference.law_of(*case)
    log_u = spread * np.random.default_rng(3).normal(size=(50, case[1]))
    probabilities, vectors = reference.patterns(*case)
    exponents = log_u @ vectors.T
    with np.errstate(divide="ignore"):
        expected = np.logaddexp.reduce(exponents + np.log(probabilities), axis=1)
    np.testing.assert_allclose(log_ratio(law, log_u), expected, rtol=1e-12, atol=1e-12)


def test_every_step_is_a_participation_with_the_same_probability():
    for case in CASES:
        probabilities, vectors = reference.patterns(*case)
        np.testing.assert_allclose(probabilities.sum(), 1.0)
        shares = probabilities @ vectors
        np.testing.assert_allclose(shares, shares[0])


def test_a_hundred_participations_neither_overflow_nor_vanish():
    law = AllocationInGroup(Rounds(400, 2), 100)
    for value in (-2.0, 5.0):
        found = log_ratio(law, np.full((3, 400), value))
        np.testing.assert_allclose(found, 100 * value, rtol=1e-12)


def test_groups_with_fewer_rounds_than_participations_are_refused():
    with pytest.raises(ValueError, match="Use at most 10 bands"):
        AllocationInGroup(Rounds(40, 11), 4)


def test_mixed_products_at_both_ends():
    # Groups of 3 and of 2 rounds: what is no step does not count, whatever it holds.
    log_u = np.array([[-900.0, 0.0], [0.5, 900.0], [900.0, 70.0]])[:, :, None]
    found = log_mixed_product(tf.constant(log_u), 0.25, Rounds(5, 2)).numpy()[:, 0]
    half = np.log(0.75 + 0.25 * np.exp(0.5))
    expected = [np.log(0.75) + half + 900 + np.log(0.25), 900 + np.log(0.25)]
    np.testing.assert_allclose(found, expected, rtol=1e-14)


def test_products_of_many_rounds_neither_overflow_nor_lose_a_round():
    random = np.random.default_rng(2)
    log_u = random.normal(size=(1300, 1, 3)) * 4
    found = log_mixed_product(tf.constant(log_u), 0.6, Rounds(1300, 1))
    expected = np.sum(np.logaddexp(np.log(0.4), np.log(0.6) + log_u), axis=0)
    np.testing.assert_allclose(found, expected, rtol=1e-12)
