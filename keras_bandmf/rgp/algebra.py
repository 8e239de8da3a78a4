"""RGP's algebra: power iteration, orthonormalization, projection, reconstruction.

Tensors in, tensors out. `m` and `n` are the sides of a weight matrix W and r the rank of its
carriers: L (m, r) with orthonormal columns and R (r, n) with orthonormal rows (Yu et al., "Large
Scale Private Learning via Low-rank Reparametrization", arXiv 2106.09352).
"""

from __future__ import annotations

import tensorflow as tf

# How much of the previous carrier is mixed in, in units of the norm of the new one. It decides only
# the directions in which the history is zero.
_FILL = 1e-6


def orthonormal(columns: tf.Tensor) -> tf.Tensor:
    """Returns an orthonormal basis of the span of columns, by Householder QR.

    Args:
        columns: Shape (m, r), r <= m, float32 or float64. Dependent columns are replaced by
            arbitrary ones, so that the result is always orthonormal.

    Returns:
        (m, r).
    """
    return tf.linalg.qr(columns, full_matrices=False).q


def aligned(basis: tf.Tensor, previous: tf.Tensor) -> tf.Tensor:
    """Rotates an orthonormal basis within its span as close as possible to another (Procrustes).

    Args:
        basis: Shape (m, r), with orthonormal columns.
        previous: Shape (m, r), with orthonormal columns.

    Returns:
        (m, r): `basis @ Q` with the orthogonal Q of least `|basis @ Q - previous|`.
    """
    _, u, v = tf.linalg.svd(tf.matmul(basis, previous, transpose_a=True))
    return tf.matmul(basis, tf.matmul(u, v, transpose_b=True))


def refined(
    history: tf.Tensor, left: tf.Tensor, right: tf.Tensor, iterations: int = 1
) -> tuple[tf.Tensor, tf.Tensor]:
    """Turns carriers towards the principal directions of the historical update.

    Power iteration `L = orth(D R')`, `R = orth(D' L)'` from the previous carriers (algorithm 2 of
    the paper starts at random each time), which are kept where the history is zero.

    Args:
        history: Shape (m, n): D, by how much the weights have moved.
        left: Shape (m, r): the previous L.
        right: Shape (r, n): the previous R.
        iterations: The number of iterations, at least 1.

    Returns:
        The new (L, R), aligned with the previous ones. A history that is not finite changes
        nothing.
    """
    new_left, new_right = left, right
    for _ in range(iterations):
        product = tf.matmul(history, new_right, transpose_b=True)
        new_left = orthonormal(_filled(product, left))
        product = tf.matmul(history, new_left, transpose_a=True)
        new_right = tf.transpose(orthonormal(_filled(product, tf.transpose(right))))
    new_left = aligned(new_left, left)
    new_right = tf.transpose(aligned(tf.transpose(new_right), tf.transpose(right)))
    return new_left, new_right


def _filled(product: tf.Tensor, previous: tf.Tensor) -> tf.Tensor:
    norm = tf.norm(product)
    usable = tf.math.is_finite(norm) & (norm > 0)
    # Scaled to norm 1: a history of 1e-30 would underflow when squared in a QR.
    scaled = tf.where(usable, product / norm, tf.zeros_like(product))
    return scaled + tf.where(usable, tf.cast(_FILL, norm.dtype), 1) * previous


def inside(left_gradient: tf.Tensor, left: tf.Tensor) -> tf.Tensor:
    """Returns `L L' dL`, the part of dL in the span of L, (m, r)."""
    return tf.matmul(left, tf.matmul(left, left_gradient, transpose_a=True))


def project(gradient: tf.Tensor, left: tf.Tensor, right: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
    """Returns the coordinates of a gradient on the carriers' tangent space.

    With dL = dW R' and dR = L' dW they are `(dL - L L' dL, dR)`: orthogonal to each other, so that
    their joint norm is that of the projected gradient (the paper's (dL, dR) count the overlap
    twice).

    Args:
        gradient: Shape (m, n): dW.
        left: Shape (m, r): L.
        right: Shape (r, n): R.

    Returns:
        (m, r) and (r, n).
    """
    thin = tf.matmul(gradient, right, transpose_b=True)
    return thin - inside(thin, left), tf.matmul(left, gradient, transpose_a=True)


def reconstruct(
    left_gradient: tf.Tensor, right_gradient: tf.Tensor, left: tf.Tensor, right: tf.Tensor
) -> tf.Tensor:
    """Returns `dW = dL R + L dR - L L' dL R`, equation 3 of the paper.

    For coordinates of `project`, with or without the part of dL inside L, this is the orthogonal
    projection of the gradient on the matrices whose columns lie in the span of L or whose rows lie
    in that of R.

    Args:
        left_gradient: Shape (m, r): dL, with noise or without.
        right_gradient: Shape (r, n): dR, with noise or without.
        left: Shape (m, r): L.
        right: Shape (r, n): R.

    Returns:
        (m, n).
    """
    outside = left_gradient - inside(left_gradient, left)
    return tf.matmul(outside, right) + tf.matmul(left, right_gradient)
