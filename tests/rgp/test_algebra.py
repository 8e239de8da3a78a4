"""RGP's algebra against NumPy, float64."""

import numpy as np
import pytest
import tensorflow as tf

from keras_bandmf.rgp import algebra

M, N, R = 12, 9, 3


def orthonormal(rng, rows, columns):
    """A random orthonormal basis."""
    return np.linalg.qr(rng.normal(size=(rows, columns)))[0]


def make(seed=0, rank=R):
    """A gradient and carriers."""
    rng = np.random.default_rng(seed)
    return rng.normal(size=(M, N)), orthonormal(rng, M, rank), orthonormal(rng, N, rank).T


def test_coordinates_are_the_projected_gradients_of_the_carriers():
    """dL = dW R', dR = L' dW by autodiff of W = L R + const."""
    dw, left, right = make()
    left_t, right_t = tf.constant(left), tf.constant(right)
    with tf.GradientTape() as tape:
        tape.watch([left_t, right_t])
        loss = tf.reduce_sum((left_t @ right_t) * dw)
    d_left, d_right = (g.numpy() for g in tape.gradient(loss, [left_t, right_t]))
    got_left, got_right = algebra.project(dw, left, right)
    np.testing.assert_allclose(got_left, d_left - left @ (left.T @ d_left), atol=1e-12)
    np.testing.assert_allclose(got_right, d_right, atol=1e-12)


@pytest.mark.parametrize("rank", [1, R, N])
def test_reconstruction_is_the_orthogonal_projection(rank):
    """dW - (I - P_L) dW (I - P_R); the norm of the coordinates is its norm."""
    dw, left, right = make(1, rank)
    outside = (np.eye(M) - left @ left.T) @ dw @ (np.eye(N) - right.T @ right)
    coordinates = algebra.project(dw, left, right)
    got = algebra.reconstruct(*coordinates, left, right).numpy()
    np.testing.assert_allclose(got, dw - outside, atol=1e-12)
    norm = np.sqrt(sum(np.sum(np.square(c)) for c in coordinates))
    np.testing.assert_allclose(norm, np.linalg.norm(got), rtol=1e-12)
    # The paper's unprojected dL gives the same matrix: the minus sign of equation 3.
    again = algebra.reconstruct(dw @ right.T, coordinates[1], left, right)
    np.testing.assert_allclose(again, got, atol=1e-12)


def test_noise_energy_is_that_of_the_tangent_space():
    """r (m + n) - r^2 independent directions, each of length one: exact, by the Jacobian."""
    _, left, right = make(2)
    count = R * (M + N)
    columns = []
    for unit in np.eye(count):
        d_left, d_right = unit[: M * R].reshape(M, R), unit[M * R :].reshape(R, N)
        columns.append(np.ravel(algebra.reconstruct(d_left, d_right, left, right)))
    singular = np.linalg.svd(np.array(columns), compute_uv=False)
    expected = np.concatenate([np.ones(count - R * R), np.zeros(min(count, M * N) - count + R * R)])
    np.testing.assert_allclose(singular, expected, atol=1e-10)


@pytest.mark.parametrize("iterations", [1, 3])
def test_power_iteration_equals_numpy(iterations):
    history, left, right = make(3)
    new_left, new_right = left, right
    for _ in range(iterations):
        product = history @ new_right.T
        new_left = np.linalg.qr(product / np.linalg.norm(product) + 1e-6 * left)[0]
        product = history.T @ new_left
        new_right = np.linalg.qr(product / np.linalg.norm(product) + 1e-6 * right.T)[0].T
    u, _, v = np.linalg.svd(new_left.T @ left)
    new_left = new_left @ u @ v
    u, _, v = np.linalg.svd(new_right @ right.T)
    new_right = (new_right.T @ u @ v).T
    got_left, got_right = algebra.refined(tf.constant(history), left, right, iterations)
    np.testing.assert_allclose(got_left, new_left, atol=1e-9)
    np.testing.assert_allclose(got_right, new_right, atol=1e-9)
    np.testing.assert_allclose(np.transpose(got_left) @ got_left, np.eye(R), atol=1e-12)
    np.testing.assert_allclose(got_right @ np.transpose(got_right), np.eye(R), atol=1e-12)


def test_carriers_find_a_history_of_low_rank():
    rng = np.random.default_rng(4)
    _, left, right = make(4)
    history = rng.normal(size=(M, R)) @ rng.normal(size=(R, N))
    left, right = (c.numpy() for c in algebra.refined(tf.constant(history), left, right))
    np.testing.assert_allclose(left @ (left.T @ history), history, atol=1e-4)
    np.testing.assert_allclose((history @ right.T) @ right, history, atol=1e-4)


def test_a_settled_history_leaves_the_carriers_in_place():
    """Signs and order do not jump: the second refresh from the same history changes nothing."""
    history, left, right = make(5)
    history = history * 1e-20
    first = algebra.refined(tf.constant(history), left, right, 200)
    second = algebra.refined(tf.constant(history), *first, 1)
    for a, b in zip(first, second, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_zero_and_broken_histories_keep_the_previous_carriers(dtype):
    _, left, right = make(6)
    left, right = left.astype(dtype), right.astype(dtype)
    for history in (np.zeros((M, N), dtype), np.full((M, N), np.nan, dtype)):
        got = algebra.refined(tf.constant(history), left, right)
        for new, old in zip(got, (left, right), strict=True):
            np.testing.assert_allclose(new, old, atol=1e-5 if dtype == np.float32 else 1e-12)


def test_a_history_of_less_than_the_rank_is_filled_with_the_previous_carriers():
    rng = np.random.default_rng(7)
    _, left, right = make(7)
    history = np.outer(rng.normal(size=M), rng.normal(size=N))
    new_left, new_right = (c.numpy() for c in algebra.refined(tf.constant(history), left, right))
    np.testing.assert_allclose(new_left.T @ new_left, np.eye(R), atol=1e-12)
    u = history[:, 0] / np.linalg.norm(history[:, 0])
    np.testing.assert_allclose(np.linalg.norm(new_left.T @ u), 1.0, atol=1e-5)
    # All but one of the old directions are still there.
    cosines = np.linalg.svd(new_left.T @ left, compute_uv=False)
    np.testing.assert_allclose(cosines[: R - 1], 1.0, atol=1e-4)
