"""Weighted samples against enumeration, other accountants and plain Monte Carlo."""

import numpy as np
import pytest
from dp_accounting.pld import privacy_loss_distribution

from keras_bandmf.accounting.amplification import proposals
from keras_bandmf.accounting.amplification.estimator import Estimator
from keras_bandmf.sampling.patterns import AllocationInGroup, PoissonInGroup, Rounds

from . import reference
from .reference import law_of


def removed(law, columns, sigma, epsilon):
    """(mean, standard error) of the remove direction."""
    proposal, _ = proposals.best_tilt(law, sigma, epsilon)
    found = Estimator(columns, law).remove(sigma, epsilon, proposal, 20_000, 5)
    return found.mean[0], np.sqrt(found.variance[0] / found.samples)


def both_directions(law, columns, sigma, epsilon, samples=20_000, seed=5):
    """(mean, standard error, largest sample over its bound): remove, and add in one or two ways."""
    estimator = Estimator(columns, law)
    proposal, bound = proposals.best_tilt(law, sigma, epsilon)
    found = [(estimator.remove(sigma, epsilon, proposal, samples, seed), bound)]
    if isinstance(law, PoissonInGroup) and law.probability < 1.0:
        dip, bound = proposals.best_dip(law, sigma, epsilon)
        found.append((estimator.dip(sigma, epsilon, dip, samples, seed), bound))
    tilt, bound = proposals.best_shift(
        estimator.mean_square, estimator.expected_participations, sigma, epsilon
    )
    found.append((estimator.shift(sigma, epsilon, tilt, samples, seed), bound))
    return [
        (m.mean[0], np.sqrt(m.variance[0] / m.samples), m.largest[0] / bound) for m, bound in found
    ]


# Four standard errors: each comparison fails by chance with probability 6e-5.
@pytest.mark.parametrize(
    "case,sigma,epsilon",
    [
        (("poisson", 7, 3, 0.3), 0.8, 0.5),
        (("poisson", 6, 1, 0.2), 0.7, 1.0),
        (("poisson", 5, 2, 1.0), 1.5, 1.0),
        (("allocation", 7, 3, 2), 1.0, 0.7),
        (("allocation", 8, 1, 3), 1.2, 0.5),
        (("allocation", 6, 2, 3), 2.0, 0.5),
    ],
)
def test_against_patterns_enumerated(case, sigma, epsilon):
    columns = reference.square_root_columns(*case[1:3])
    probabilities, vectors = reference.patterns(*case)
    remove, add = reference.plain_deltas(
        reference.dense(columns), probabilities, vectors, sigma, epsilon, 200_000, 11
    )
    found = both_directions(law_of(*case), columns, sigma, epsilon)
    for (mean, error, share), (expected, its_error) in zip(
        found, [remove, *[add] * (len(found) - 1)], strict=True
    ):
        assert abs(mean - expected) < 4 * np.hypot(error, its_error)
        assert share <= 1.0 + 1e-9


def test_dp_sgd_is_that_of_privacy_loss_distributions():
    sigma, epsilon, steps, q = 0.9, 0.7, 50, 0.05
    law = PoissonInGroup(Rounds(steps, 1), q)
    # The shift is no proposal for so many steps: it finds nothing.
    found = both_directions(law, np.ones((steps, 1)), sigma, epsilon)[:2]
    loss = privacy_loss_distribution.from_gaussian_mechanism(
        sigma, sampling_prob=q, value_discretization_interval=1e-3
    ).self_compose(steps)
    expected = [loss._pmf_remove, loss._pmf_add]
    for (mean, error, share), pmf in zip(found, expected, strict=True):
        assert abs(mean - pmf.get_delta_for_epsilon(epsilon)) < 4 * error
        assert share <= 1.0 + 1e-9


# Of ../shared/notes/amplification.md, by two programs that are not in this repository: (law, bands,
# sigma, epsilon, delta, its standard error).
TABLE = [
    ("poisson", 11, 1.10, 1, 4.56e-2, 2e-4),
    ("poisson", 11, 1.10, 2, 3.78e-3, 5e-5),
    ("poisson", 11, 1.10, 3, 1.9e-4, 1e-5),
    ("poisson", 11, 1.10, 4, 6e-6, 2e-6),
    ("allocation", 12, 0.94, 1, 7.95e-2, 2e-4),
    ("allocation", 12, 0.94, 2, 7.77e-3, 6e-5),
    ("allocation", 12, 0.94, 3, 2.87e-4, 1e-5),
    ("allocation", 12, 0.87, 2, 1.54e-2, 1e-4),
    ("allocation", 12, 0.87, 3, 1.05e-3, 3e-5),
    ("allocation", 12, 0.87, 4, 4.5e-5, 5e-6),
    ("allocation", 12, 1.00, 3, 9.0e-5, 5e-6),
    ("allocation", 12, 1.00, 4, 6e-7, 3e-7),
]


@pytest.mark.parametrize("name,bands,sigma,epsilon,delta,error", TABLE)
def test_the_table_of_plain_monte_carlo(name, bands, sigma, epsilon, delta, error):
    rounds = Rounds(240, bands)
    law = PoissonInGroup(rounds, bands * 25 / 1500)
    if name == "allocation":
        law = AllocationInGroup(rounds, 4)
    estimator = Estimator(reference.square_root_columns(240, bands), law)
    proposal, _ = proposals.best_tilt(law, sigma, float(epsilon))
    found = estimator.remove(sigma, float(epsilon), proposal, 20_000, 5)
    own_error = np.sqrt(found.variance[0] / found.samples)
    assert abs(found.mean[0] - delta) < 3 * np.hypot(own_error, error)


def test_planted_bugs_are_seen():
    # The group known, one participation more, the rate of one group less: another law each.
    rounds, columns = Rounds(240, 11), reference.square_root_columns(240, 11)
    law, sigma, epsilon = PoissonInGroup(rounds, 11 * 25 / 1500), 1.1, 2.0
    right = removed(law, columns, sigma, epsilon)
    loss = privacy_loss_distribution.from_gaussian_mechanism(
        sigma, sampling_prob=law.probability, value_discretization_interval=1e-3
    ).self_compose(rounds.most)
    assert loss.get_delta_for_epsilon(epsilon) > 2 * (right[0] + 4 * right[1])
    for other in (PoissonInGroup(rounds, 10 * 25 / 1500), PoissonInGroup(rounds, 12 * 25 / 1500)):
        wrong = removed(other, columns, sigma, epsilon)
        assert abs(wrong[0] - right[0]) > 6 * np.hypot(wrong[1], right[1])
    exact = [removed(AllocationInGroup(rounds, k), columns, sigma, epsilon) for k in (4, 5)]
    assert exact[1][0] - exact[0][0] > 6 * np.hypot(exact[0][1], exact[1][1])
    # The last columns, which end with the run, count.
    short = columns.copy()
    short[-20:] *= 0.5
    with pytest.raises(ValueError, match="law"):
        Estimator(columns[:-20], law)
    scaled = removed(law, short, sigma, epsilon)
    assert scaled == right  # scaled up to norm 1 again


def test_a_seed_decides_all_samples():
    law = PoissonInGroup(Rounds(10, 3), 0.2)
    columns = reference.square_root_columns(10, 3)
    proposal, _ = proposals.best_tilt(law, 1.0, 1.0)
    first, again, other = (
        Estimator(columns, law).remove(1.0, [0.5, 1.0], proposal, 50_000, seed)
        for seed in (1, 1, 2)
    )
    np.testing.assert_array_equal(first.mean, again.mean)
    assert np.all(first.mean != other.mean)
    assert first.mean[0] > first.mean[1]


@pytest.mark.parametrize(
    "columns",
    [
        np.zeros((4, 2)),
        np.full((4, 2), 0.9),
        np.ones((3, 2)) / 2,
        np.full((4, 2), 0.5),  # the last column goes on beyond the last step
    ],
)
def test_columns_that_are_not_of_the_law_are_refused(columns):
    with pytest.raises(ValueError, match="Received"):
        Estimator(columns, PoissonInGroup(Rounds(4, 2), 0.5))


def test_signs_do_not_matter():
    law = PoissonInGroup(Rounds(6, 2), 0.4)
    columns = reference.square_root_columns(6, 2)
    signs = columns * np.array([1.0, -1.0])
    assert removed(law, columns, 1.0, 1.0) == removed(law, signs, 1.0, 1.0)
