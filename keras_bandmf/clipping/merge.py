"""Joins several uses of one variable before the norm is taken, tied tables among them."""

from __future__ import annotations

from collections.abc import Sequence

import tensorflow as tf

from keras_bandmf.clipping.factors import (
    Factor,
    Layout,
    Lookup,
    Outer,
    Rows,
    Unsupported,
    floored,
    prefers_product,
)
from keras_bandmf.clipping.shapes import dims, static


class Tied:
    """The gradients of a table that is read by look-up and also used as a matrix: the sum of both.

    The squared norm of L + D is |L|^2 + |D|^2 + 2 <L, D>. With L the look-up's gradient (g_t on row
    ids_t) and D = a'b of the matrix's, <L, D> = sum over s, t of a_s[ids_t] (b_s . g_t).
    """

    def __init__(self, lookup: Lookup, outer: Outer):
        self.lookup = lookup
        self.outer = outer

    def joined(self, factors: Sequence[Factor]) -> Tied:
        """Returns itself: it stands for all calls of its table already."""
        if len(factors) > 1:
            raise Unsupported("a look-up table is also used in another way (tied weights)")
        return self

    def grouped(self, size: int, mask: tf.Tensor) -> Tied:
        """Returns the sums over the rows of each example."""
        return Tied(self.lookup.grouped(size, mask), self.outer.grouped(size, mask))

    def resolved(self) -> Rows | Tied:
        """Returns `Rows` if the product is the cheaper way to the norm, else itself."""
        a, b = self.outer.a, self.outer.g
        count = dims(a)[2]
        # Logits over a vocabulary are already the largest tensors of a model. A product of their
        # size for each example would raise peak memory, so it must be smaller than elsewhere.
        share = max(count // 4, 1) if static(count) else count
        if not prefers_product(share, dims(a)[-1], dims(b)[-1]):
            return self
        batch, count = dims(self.lookup.ids)
        rows = tf.broadcast_to(tf.range(batch)[:, None], [batch, count])
        index = tf.stack([rows, self.lookup.ids], axis=-1)
        values = self.outer.as_rows().values[:, 0]
        return Rows(tf.tensor_scatter_nd_add(values, index, self.lookup.g))

    def squared_norms(self) -> tf.Tensor:
        """Returns the squared norm of every gradient, (batch,), the cross term included."""
        a, b = self.outer.a[:, 0], self.outer.g[:, 0]
        ids, g = self.lookup.ids, self.lookup.g
        read = tf.gather(a, ids, axis=2, batch_dims=1)
        cross = tf.reduce_sum(read * tf.matmul(b, g, transpose_b=True), axis=[1, 2])
        exact, bound = self.outer.gram()
        bound += tf.reduce_sum(tf.norm(g, axis=-1), axis=1)
        return floored(self.lookup.squared_norms() + exact + 2 * cross, bound)

    def weighted_sum(self, weights: tf.Tensor) -> tf.Tensor:
        """Returns the sum over examples of weight times gradient, in the table's shape, float64."""
        return self.lookup.weighted_sum(weights) + tf.cast(
            self.outer.weighted_sum(weights), tf.float64
        )


def merged(factors: Sequence[Factor]) -> Factor:
    """Returns one factor for a variable used in several calls; they add up before the norm.

    Args:
        factors: One factor or more, all of one variable and over the same examples, one for each
            call of a layer that uses the variable.

    Returns:
        A factor ready for `squared_norms` and `weighted_sum`.

    Raises:
        Unsupported: If the gradients of the calls are arranged in different ways.

    Formal guarantees: the result stands for the sum of `factors`, example by example; what cannot
    be joined exactly is refused.
    """
    lookups = [factor for factor in factors if isinstance(factor, Lookup)]
    outers = [factor for factor in factors if isinstance(factor, Outer)]
    if lookups:
        if len(lookups) + len(outers) < len(factors):
            raise Unsupported("a look-up table is also used in another way (tied weights)")
        lookup = lookups[0].joined(lookups)
        if not outers:
            return lookup
        if any(f.layout != Layout((lookup.rows, dims(lookup.g)[-1])) for f in outers):
            raise Unsupported("a look-up table is also used in another way (tied weights)")
        return Tied(lookup, outers[0].joined(outers)).resolved()
    if any(isinstance(factor, Rows) for factor in factors):
        factors = [f.as_rows() if isinstance(f, Outer) else f for f in factors]
    return factors[0].joined(factors).resolved()
