"""Per-example gradients kept as factors: squared norms and weighted sums, nothing larger.

A factor stands for one gradient per example of one variable. `Rows` holds the gradients
themselves, `Outer` two matrices whose product they are, `Lookup` the rows of a table that were
read. All of them are float32 (float64 for float64 variables), whatever the model computes in.
"""

from __future__ import annotations

from collections.abc import Callable

import tensorflow as tf

from keras_bandmf.clipping.shapes import dims, over_rows, product, static

Layout = Callable[[tf.Tensor], tf.Tensor]

# Below this share of the largest value it could have, a Gram norm is rounding error.
_GRAM_FLOOR = 64.0
# Positions assumed when their number is unknown before the graph runs.
_UNKNOWN_POSITIONS = 64


class Unsupported(Exception):
    """This layer or model cannot take the book-keeping path; the message says why."""


def _weighted(values: tf.Tensor, weights: tf.Tensor) -> tf.Tensor:
    """Rows of `values` times `weights`; exactly zero where the weight is (0 * NaN is NaN)."""
    weights = over_rows(weights, values)
    return tf.where(weights > 0, values * weights, tf.zeros_like(values))


def _kept(values: tf.Tensor, weights: tf.Tensor) -> tf.Tensor:
    """Rows of `values` whose weight is not zero; the others replaced by zeros."""
    return tf.where(over_rows(weights, values) > 0, values, tf.zeros_like(values))


class Rows:
    """Gradients themselves: `values` (batch, ...); `layout` maps their sum to the variable."""

    def __init__(self, values: tf.Tensor, layout: Layout | None = None):
        self.values = values
        self.layout = layout

    def squared_norms(self) -> tf.Tensor:
        """Squared norm of every example's gradient, shape (batch,)."""
        return tf.reduce_sum(tf.square(self.values), axis=list(range(1, self.values.shape.rank)))

    def weighted_sum(self, weights: tf.Tensor) -> tf.Tensor:
        """Sum over examples of weight times gradient, in the variable's shape."""
        sizes = dims(self.values)
        flat = tf.reshape(self.values, [sizes[0], product(sizes[1:])])
        total = tf.linalg.matvec(_kept(flat, weights), weights, transpose_a=True)
        total = tf.reshape(total, sizes[1:])
        return total if self.layout is None else self.layout(total)


class Outer:
    """Gradients a'g: `a` (batch, groups, positions, in), `g` (batch, groups, positions, out).

    `layout` maps the (groups, in, out) sum to the variable's shape.
    """

    def __init__(self, a: tf.Tensor, g: tf.Tensor, layout: Layout):
        self.a = a
        self.g = g
        self.layout = layout

    def resolved(self) -> Rows | Outer:
        """`Rows` if the product is the cheaper way to the norm, else itself."""
        _, _, count, width = dims(self.a)
        return self.as_rows() if prefers_product(count, width, dims(self.g)[-1]) else self

    def as_rows(self) -> Rows:
        """The products written out: (batch, groups, in, out)."""
        if self.a.shape[1] == 1:
            values = tf.matmul(self.a[:, 0], self.g[:, 0], transpose_a=True)[:, None]
        else:
            values = tf.matmul(self.a, self.g, transpose_a=True)
        return Rows(values, self.layout)

    def squared_norms(self) -> tf.Tensor:
        """Squared norms by Gram matrices: sum over positions s, t of (a_s . a_t)(g_s . g_t)."""
        if static(dims(self.a)[2]) == 1:
            return tf.reduce_sum(_lengths(self.a) * _lengths(self.g), axis=[1, 2])
        grams = tf.matmul(self.a, self.a, transpose_b=True)
        grams *= tf.matmul(self.g, self.g, transpose_b=True)
        exact = tf.reduce_sum(grams, axis=[1, 2, 3])
        # Cancelling terms leave only rounding error, which could hide a large gradient: the floor
        # keeps the norm from being understated, so the clip still holds.
        bound = tf.reduce_sum(tf.sqrt(_lengths(self.a) * _lengths(self.g)), axis=[1, 2])
        floor = _GRAM_FLOOR * _epsilon(self.a.dtype)
        return tf.where(exact > floor * tf.square(bound), exact, _floored(exact, floor, bound))

    def weighted_sum(self, weights: tf.Tensor) -> tf.Tensor:
        """Sum over examples of weight times a'g, in the variable's shape."""
        a, g = _kept(self.a, weights), _weighted(self.g, weights)
        if a.shape[1] == 1:
            total = tf.matmul(_flat(a), _flat(g), transpose_a=True)[None]
        else:
            total = tf.einsum("bgti,bgto->gio", a, g)
        return self.layout(total)


class Lookup:
    """Gradients of a table: example i adds g[i, t] to row ids[i, t].

    `ids` (batch, positions) int32, `g` (batch, positions, width), `rows` of the table.
    """

    def __init__(self, ids: tf.Tensor, g: tf.Tensor, rows: int):
        self.ids = ids
        self.g = g
        self.rows = rows

    def squared_norms(self) -> tf.Tensor:
        """Squared norms; positions that read the same row are added up first."""
        batch, count = dims(self.ids)
        if static(count) == 1:
            return tf.reduce_sum(tf.square(self.g), axis=[1, 2])
        order = tf.argsort(self.ids, axis=1)
        ids = tf.gather(self.ids, order, batch_dims=1)
        g = tf.gather(self.g, order, batch_dims=1)
        new = tf.cast(ids[:, 1:] != ids[:, :-1], tf.int32)
        segments = tf.cumsum(tf.pad(new, [[0, 0], [1, 0]]), axis=1)
        segments += count * tf.range(batch)[:, None]
        width = dims(self.g)[-1]
        added = tf.math.unsorted_segment_sum(
            tf.reshape(g, [batch * count, width]),
            tf.reshape(segments, [batch * count]),
            batch * count,
        )
        return tf.reduce_sum(tf.square(tf.reshape(added, [batch, count, width])), axis=[1, 2])

    def weighted_sum(self, weights: tf.Tensor) -> tf.Tensor:
        """Sum over examples of weight times gradient, dense: (rows, width)."""
        sizes = dims(self.g)
        flat = tf.reshape(_weighted(self.g, weights), [sizes[0] * sizes[1], sizes[2]])
        ids = tf.reshape(self.ids, [sizes[0] * sizes[1]])
        return tf.math.unsorted_segment_sum(flat, ids, self.rows)


Factor = Rows | Outer | Lookup


def merged(factors: list[Factor]) -> Rows | Outer | Lookup:
    """One factor for a variable used in several calls; they add up before the norm is taken.

    Args:
        factors: at least one factor of one variable, all over the same examples.

    Returns:
        A factor ready for `squared_norms` and `weighted_sum`.

    Raises:
        Unsupported: a table that is read by look-up is also used in another way (tied weights).
    """
    if any(hasattr(f, "joined") for f in factors):
        # A factor from another room, which alone knows how its calls add up.
        if any(type(f) is not type(factors[0]) for f in factors):
            raise Unsupported("one variable is used by layers of different kinds (tied weights)")
        return factors[0].joined(factors)
    if all(isinstance(f, Outer) for f in factors):
        first = factors[0]
        if len(factors) == 1:
            return first.resolved()
        a = tf.concat([f.a for f in factors], axis=2)
        g = tf.concat([f.g for f in factors], axis=2)
        return Outer(a, g, first.layout).resolved()
    if all(isinstance(f, Lookup) for f in factors):
        if len(factors) == 1:
            return factors[0]
        ids = tf.concat([f.ids for f in factors], axis=1)
        return Lookup(ids, tf.concat([f.g for f in factors], axis=1), factors[0].rows)
    if any(isinstance(f, Lookup) for f in factors):
        raise Unsupported("a look-up table is also used in another way (tied weights)")
    rows = [f.as_rows() if isinstance(f, Outer) else f for f in factors]
    if any(r.values.shape[1:] != rows[0].values.shape[1:] for r in rows):
        raise Unsupported("one variable is used by layers of different kinds (tied weights)")
    return Rows(tf.add_n([r.values for r in rows]), rows[0].layout)


def prefers_product(count: object, width_in: int, width_out: int) -> bool:
    """Whether the product a'g of an example is to be written out.

    It saves the Gram matrices and gives the clipped sum almost for free, and is worth it while it
    is not much larger than the activations and gradients it is made of.

    Args:
        count: positions T of an example: an int, or a tensor if unknown before the graph runs.
        width_in: columns of a.
        width_out: columns of g.
    """
    known = static(count) or _UNKNOWN_POSITIONS
    if known == 1:
        return False
    return width_in * width_out <= 2 * known * (width_in + width_out)


def _lengths(matrix: tf.Tensor) -> tf.Tensor:
    return tf.reduce_sum(tf.square(matrix), axis=-1)


def _flat(stacked: tf.Tensor) -> tf.Tensor:
    batch, _, count, width = dims(stacked)
    return tf.reshape(stacked, [batch * count, width])


def _floored(exact: tf.Tensor, floor: float, bound: tf.Tensor) -> tf.Tensor:
    # A NaN stays a NaN: the example is dropped, not clipped.
    return tf.where(tf.math.is_nan(exact), exact, floor * tf.square(bound))


def _epsilon(dtype: tf.DType) -> float:
    return 2.0**-52 if dtype == tf.float64 else 2.0**-23
