"""The scores of the step audit follow the law of the mechanism, simulated here without the library.

The audit is as strong as its scores: an attack that looks at the wrong steps, or weighs them
wrongly, would be quiet about every bug. The scores of real runs are compared with those of an
independent simulation in NumPy (two-sample Kolmogorov-Smirnov). Runs are random: a sound one fails
here with a probability of about 2 * 10^-4.
"""

import numpy as np
import pytest
import scipy.stats

import keras_bandmf as bandmf
from keras_bandmf.audit import step_audit

CHANCE = 1e-4
ROWS, BANDS, SIGMA, EPOCHS, BATCH = 3_000, 3, 1.2, 2, 300


def make_plan(sampling):
    return bandmf.TrainingPlan(
        num_examples=ROWS,
        batch_size=BATCH,
        epochs=EPOCHS,
        noise_multiplier=SIGMA,
        delta=1e-5,
        num_bands=BANDS,
        sampling=sampling,
    )


def evidence(rng, column_norms, takes_part):
    """Log likelihood ratios of a participation: of N(|c|^2, |c|^2 sigma^2) against a mean of 0."""
    energy = column_norms**2
    seen = energy * takes_part + column_norms * SIGMA * rng.normal(size=takes_part.shape)
    return (seen - energy / 2) / SIGMA**2


def of_cyclic_poisson(rng, norms, included):
    """An attacker who knows the group of a canary, but not in which of its steps it took part."""
    steps, rate = len(norms), BANDS * BATCH / ROWS
    group = rng.integers(0, BANDS, len(included))
    turn = np.arange(steps)[:, None] % BANDS == group
    takes_part = turn & (rng.random((steps, len(included))) < rate) & included
    found = evidence(rng, norms[:, None], takes_part)
    return np.where(turn, np.log1p(rate * np.expm1(found)), 0.0).sum(axis=0)


def of_random_allocation(rng, norms, included):
    """An attacker who knows the steps: without a certificate, the accounting gives them away."""
    found = np.zeros(len(included))
    for canary in range(len(included)):
        group = rng.integers(0, len(norms)) % BANDS
        chosen = rng.choice(np.arange(group, len(norms), BANDS), EPOCHS, replace=False)
        takes_part = np.full(EPOCHS, included[canary])
        found[canary] = evidence(rng, norms[chosen], takes_part).sum()
    return found


@pytest.fixture(scope="module")
def rng():
    return np.random.default_rng(12)


@pytest.mark.parametrize(
    ("sampling", "simulation"),
    [
        ("cyclic_poisson", of_cyclic_poisson),
        pytest.param("random_allocation", of_random_allocation, marks=pytest.mark.slow),
    ],
)
def test_scores_are_those_of_an_independent_simulation(sampling, simulation, rng):
    plan = make_plan(sampling)
    included = np.arange(ROWS) % 2 == 0
    likelihood_ratios = step_audit._scores_of_run(plan, included, None, 1)[0]
    norms = np.linalg.norm(plan.strategy.materialize(), axis=0)
    expected = simulation(rng, norms, included)
    for side in (included, ~included):
        found = scipy.stats.ks_2samp(likelihood_ratios[side], expected[side])
        assert found.pvalue > CHANCE, found
    # And the two sides do differ, so that the comparison can tell them apart.
    assert scipy.stats.ks_2samp(expected[included], expected[~included]).pvalue < 1e-6
    # A likelihood ratio has the mean 1 where the canary is out: nothing is counted twice.
    ratios = np.exp(likelihood_ratios[~included])
    assert abs(ratios.mean() - 1.0) < 5 * ratios.std() / np.sqrt(len(ratios))
