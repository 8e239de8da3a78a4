"""Independent dense NumPy programs: patterns are enumerated, nothing is tilted."""

import itertools
import math

import numpy as np

from keras_bandmf.sampling.patterns import AllocationInGroup, PoissonInGroup, Rounds


def law_of(name, num_steps, num_bands, value):
    """A law of the library: `value` is q or k."""
    rounds = Rounds(num_steps, num_bands)
    return (PoissonInGroup if name == "poisson" else AllocationInGroup)(rounds, value)


def square_root_columns(num_steps, num_bands):
    """Coefficients of (1 - x)^(-1/2), each column scaled to norm 1: shape (n, b)."""
    coefficients = np.cumprod([1.0, *((2 * i - 1) / (2 * i) for i in range(1, num_bands))])
    columns = np.zeros((num_steps, num_bands))
    for i in range(num_steps):
        columns[i, : num_steps - i] = coefficients[: num_steps - i]
    return columns / np.linalg.norm(columns, axis=1, keepdims=True)


def dense(columns):
    """C, shape (n, n)."""
    steps, bands = columns.shape
    matrix = np.zeros((steps, steps))
    for i in range(steps):
        for lag in range(min(bands, steps - i)):
            matrix[i + lag, i] = columns[i, lag]
    return matrix


def patterns(law_name, num_steps, num_bands, value):
    """All (probability, pattern) of a law; `value` is q or k."""
    found = []
    for group in range(num_bands):
        rounds = range(group, num_steps, num_bands)
        if law_name == "poisson":
            for taken in itertools.product([0, 1], repeat=len(rounds)):
                probability = math.prod(value if t else 1 - value for t in taken) / num_bands
                found.append((probability, [i for i, t in zip(rounds, taken, strict=True) if t]))
        else:
            weight = len(rounds) / num_steps / math.comb(len(rounds), value)
            found += [(weight, list(s)) for s in itertools.combinations(rounds, value)]
    vectors = []
    for _, steps in found:
        vector = np.zeros(num_steps)
        vector[steps] = 1.0
        vectors.append(vector)
    return np.array([p for p, _ in found]), np.array(vectors)


def log_ratio(matrix, probabilities, vectors, sigma, y):
    """log dP/dQ at y, shape (samples, n), of the pair in units of y with deviation sigma."""
    possible = probabilities > 0.0
    probabilities, means = probabilities[possible], vectors[possible] @ matrix.T
    exponents = (y @ means.T - 0.5 * np.sum(means**2, axis=1)) / sigma**2
    return np.logaddexp.reduce(exponents + np.log(probabilities), axis=1)


def plain_deltas(matrix, probabilities, vectors, sigma, epsilon, samples, seed):
    """((mean, standard error) of the remove and of the add direction), by plain Monte Carlo."""
    random = np.random.default_rng(seed)
    noise = random.normal(size=(samples, len(matrix))) * sigma
    chosen = random.choice(len(probabilities), size=samples, p=probabilities / probabilities.sum())
    with_example = noise + (vectors @ matrix.T)[chosen]
    remove = -np.expm1(
        np.minimum(epsilon - log_ratio(matrix, probabilities, vectors, sigma, with_example), 0)
    )
    add = -np.expm1(
        np.minimum(epsilon + log_ratio(matrix, probabilities, vectors, sigma, noise), 0)
    )
    return [(v.mean(), v.std() / math.sqrt(samples)) for v in (remove, add)]
