"""No adaptive choice of vector gradients has a larger divergence than the scalar pair.

The theorem of docs/amplification.md, by integration over all releases: three steps of gradients in
the plane, which depend on earlier releases (and, for some adversaries, on the pattern) smoothly, so
that the trapezoid rule is exact to many digits.
"""

import numpy as np
import pytest

from . import reference

STEP, REACH = 0.8, 4.8
POINTS = np.arange(-REACH, REACH + 1e-9, STEP)
SIGMA = 0.9


def integral(densities, likelihood_ratio, epsilon):
    """(remove, add): E_Q (L - e^epsilon)_+ and E_Q (1 - e^epsilon L)_+."""
    weights = densities / densities.sum()
    return (
        float(np.sum(weights * np.maximum(likelihood_ratio - np.exp(epsilon), 0.0))),
        float(np.sum(weights * np.maximum(1.0 - np.exp(epsilon) * likelihood_ratio, 0.0))),
    )


def divergences(matrix, probabilities, vectors, gradient, epsilon):
    """Both divergences of all releases, y_i in the plane, in units of sigma."""
    axes = np.meshgrid(*[POINTS] * 6, indexing="ij", sparse=True)
    y = [axes[2 * i : 2 * i + 2] for i in range(3)]
    densities = np.exp(-0.5 * sum(axis**2 for axis in axes))
    ratio = 0.0
    for number, (probability, pattern) in enumerate(zip(probabilities, vectors, strict=True)):
        exponent = 0.0
        gradients = []
        for i in range(3):
            gradients.append(gradient(i, y[:i], number))
            mean = [
                sum(matrix[i, j] * pattern[j] * gradients[j][part] / SIGMA for j in range(i + 1))
                for part in (0, 1)
            ]
            exponent = exponent + sum(
                m * value - 0.5 * m**2 for m, value in zip(mean, y[i], strict=True)
            )
        ratio = ratio + probability * np.exp(exponent)
    return integral(densities, ratio, epsilon)


def adversary(random, by_pattern):
    """Unit gradients whose angle is a smooth function of what was released, of random strength."""
    first = random.normal(size=(8, 3)) * by_pattern
    slopes = random.normal(size=(8 if by_pattern else 1, 3, 3, 2)) * random.choice([0.3, 1.0])
    reach = random.uniform(0.3, 3.0)

    def gradient(i, past, number):
        angle = first[number % 8, i]
        for j, release in enumerate(past):
            for part, value in enumerate(release):
                angle = angle + slopes[number % len(slopes), i, j, part] * np.tanh(value)
        angle = reach * np.tanh(angle)
        return np.cos(angle), np.sin(angle)

    return gradient


@pytest.mark.parametrize("signs", [False, True])
@pytest.mark.parametrize("law", [("poisson", 3, 2, 0.5), ("allocation", 3, 2, 1)])
def test_no_adversary_does_better_than_the_scalar_pair(law, signs):
    random = np.random.default_rng(17)
    matrix = np.array([[0.8, 0.0, 0.0], [0.6, 0.8, 0.0], [0.0, 0.6, 1.0]])
    probabilities, vectors = reference.patterns(*law)
    signed = matrix * np.where(np.tri(3, k=-1) > 0, -1.0 if signs else 1.0, 1.0)
    for epsilon in (0.2, 0.6):
        pair = divergences(
            matrix, probabilities, vectors, lambda i, past, number: (1.0, 0.0), epsilon
        )
        assert min(pair) > 1e-3
        found = [
            divergences(signed, probabilities, vectors, adversary(random, trial % 2 == 1), epsilon)
            for trial in range(3)
        ]
        for remove, add in found:
            assert remove <= pair[0] * (1 + 1e-3) and add <= pair[1] * (1 + 1e-3)
        # They differ: the adversaries are not the scalar pair in disguise.
        assert min(remove for remove, _ in found) < 0.99 * pair[0]


def test_absolute_values_are_needed_and_reached():
    # With minus signs below the diagonal, gradients of alternating direction do as much as |C|
    # says, which is more than the signed matrix itself would.
    matrix = np.array([[0.8, 0.0, 0.0], [-0.6, 0.8, 0.0], [0.0, -0.6, 1.0]])
    probabilities, vectors = np.array([0.5, 0.5]), np.array([[1.0, 1.0, 0.0], [0.0, 1.0, 1.0]])

    def constant(i, past, number):
        return 1.0, 0.0

    def alternating(i, past, number):
        return (-1.0) ** i, 0.0

    run = probabilities, vectors
    signed = divergences(matrix, *run, constant, 0.5)
    reached = divergences(matrix, *run, alternating, 0.5)
    pair = divergences(np.abs(matrix), *run, constant, 0.5)
    np.testing.assert_allclose(reached, pair, rtol=1e-3)
    assert all(more > 1.1 * less for more, less in zip(pair, signed, strict=True))
