"""Independent, slow answers for the tests: dense NumPy, explicit loops, closed forms."""

import collections
import itertools

import keras
import numpy as np
import scipy.signal


def dense_strategy(coefficients, num_steps, column_normalize):
    """C by its definition, entry by entry."""
    matrix = np.zeros((num_steps, num_steps))
    for j in range(num_steps):
        for k, value in enumerate(coefficients):
            if j + k < num_steps:
                matrix[j + k, j] = value
        if column_normalize:
            matrix[:, j] /= np.sqrt(np.sum(matrix[:, j] ** 2))
    return matrix


def dense_errors(matrix):
    """Squared row norms of A C^-1."""
    return np.sum((np.tril(np.ones_like(matrix)) @ np.linalg.inv(matrix)) ** 2, axis=1)


def filtered_sums(coefficients, num_steps):
    """x = running sum of the first column of C^-1, step by step."""
    impulse = np.zeros(num_steps)
    impulse[0] = 1.0
    return np.cumsum(scipy.signal.lfilter([1.0], coefficients, impulse))


def weighted_error(coefficients, num_steps, mean_weight, last_weight):
    """The weighted error and its gradient by the recurrence and its transpose, step by step."""
    x = filtered_sums(coefficients, num_steps)
    weighted = (mean_weight * (num_steps - np.arange(num_steps)) + last_weight) * x
    adjoint = scipy.signal.lfilter([1.0], coefficients, weighted[::-1])[::-1]
    lags = range(len(coefficients))
    gradient = [-2.0 * adjoint[j:] @ x[: num_steps - j] for j in lags]
    return weighted @ x, np.array(gradient)


def patterns(num_steps, max_participations, min_separation, first=0):
    """Every non-empty allowed participation pattern from step `first` on."""
    if max_participations == 0:
        return
    for start in range(first, num_steps):
        yield (start,)
        later = (num_steps, max_participations - 1, min_separation, start + min_separation)
        for rest in patterns(*later):
            yield (start, *rest)


def fixed_order_patterns(num_steps, max_participations, separation):
    """Every non-empty pattern of steps exactly `separation` apart."""
    for size in range(1, max_participations + 1):
        for start in range(num_steps - (size - 1) * separation):
            yield tuple(start + t * separation for t in range(size))


def largest_gram_sum(matrix, allowed):
    """Root of the largest sum of |C'C| over a pattern: the sensitivity if C is not negative."""
    gram = np.abs(matrix.T @ matrix)
    by_size = collections.defaultdict(list)
    for pattern in allowed:
        by_size[len(pattern)].append(pattern)
    sums = []
    for steps in map(np.array, by_size.values()):
        sums.append(np.max(np.sum(gram[steps[:, :, None], steps[:, None, :]], axis=(1, 2))))
    return np.sqrt(max(sums))


def brute_force_sensitivity(matrix, max_participations, min_separation):
    """Largest norm of a signed sum of columns over every pattern and every sign."""
    best = 0.0
    for pattern in patterns(len(matrix), max_participations, min_separation):
        columns = matrix[:, pattern]
        for signs in itertools.product([1.0, -1.0], repeat=len(pattern)):
            best = max(best, float(np.linalg.norm(columns @ np.array(signs))))
    return best


def dense_columns(columns):
    """C by its definition from its columns as they are, entry by entry."""
    num_steps = len(columns)
    matrix = np.zeros((num_steps, num_steps))
    for j, column in enumerate(columns):
        for k, value in enumerate(column[: num_steps - j]):
            matrix[j + k, j] = value
    return matrix


def dense_error_gradient(matrix, workload, weights):
    """Gradient of `weights @ (squared row norms of A C^-1)` with respect to every entry of C."""
    inverse = np.linalg.inv(matrix)
    product = workload @ inverse
    return -2.0 * inverse.T @ workload.T @ (weights[:, None] * product) @ inverse.T


def band_of(matrix, num_bands):
    """`(n, b)`: row j is column j of a matrix from its diagonal down, zero past the last row."""
    rows = np.zeros((len(matrix), num_bands))
    for j in range(len(matrix)):
        column = matrix[j : j + num_bands, j]
        rows[j, : len(column)] = column
    return rows


def keras_sgd(workload):
    """The optimizer of a workload, at the learning rate of its first step."""
    return keras.optimizers.SGD(
        learning_rate=float(np.ravel(workload.learning_rates)[0]),
        momentum=workload.momentum,
        nesterov=workload.nesterov,
        weight_decay=workload.weight_decay or None,
    )
