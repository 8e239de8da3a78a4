"""Several uses of one variable, tied tables among them, joined before the norm is taken."""

from __future__ import annotations

import tensorflow as tf

from keras_bandmf.clipping.factors import (
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
    """Gradients of a table read by look-up and used as a matrix: the sum of both.

    The squared norm of L + D is |L|^2 + |D|^2 + 2 <L, D>. With L the look-up's gradient (g_t on row
    ids_t) and D = a'b of the matrix's, <L, D> = sum over s, t of a_s[ids_t] (b_s . g_t).
    """

    def __init__(self, lookup: Lookup, outer: Outer):
        self.lookup = lookup
        self.outer = outer

    def resolved(self) -> Rows | Tied:
        """`Rows` if the product is the cheaper way to the norm, else itself."""
        a, b = self.outer.a, self.outer.g
        count = dims(a)[2]
        # Logits over a vocabulary are a model's largest tensors as it is: a product of their size
        # for each example would show in the peak, so it has to be smaller than elsewhere.
        share = max(count // 4, 1) if static(count) else count
        if not prefers_product(share, dims(a)[-1], dims(b)[-1]):
            return self
        batch, count = dims(self.lookup.ids)
        rows = tf.broadcast_to(tf.range(batch)[:, None], [batch, count])
        index = tf.stack([rows, self.lookup.ids], axis=-1)
        values = self.outer.as_rows().values[:, 0]
        return Rows(tf.tensor_scatter_nd_add(values, index, self.lookup.g))

    def squared_norms(self) -> tf.Tensor:
        """Squared norm of every example's gradient, shape (batch,), the cross term included."""
        a, b = self.outer.a[:, 0], self.outer.g[:, 0]
        ids, g = self.lookup.ids, self.lookup.g
        read = tf.gather(a, ids, axis=2, batch_dims=1)
        cross = tf.reduce_sum(read * tf.matmul(b, g, transpose_b=True), axis=[1, 2])
        exact, bound = self.outer.gram()
        bound += tf.reduce_sum(tf.norm(g, axis=-1), axis=1)
        return floored(self.lookup.squared_norms() + exact + 2 * cross, bound)

    def weighted_sum(self, weights: tf.Tensor) -> tf.Tensor:
        """Sum over examples of weight times gradient, in the table's shape, float64."""
        return self.lookup.weighted_sum(weights) + tf.cast(
            self.outer.weighted_sum(weights), tf.float64
        )


Factor = Rows | Outer | Lookup | Tied


def merged(factors: list[Rows | Outer | Lookup]) -> Factor:
    """One factor for a variable used in several calls; they add up before the norm is taken.

    Args:
        factors: at least one factor of one variable, all over the same examples.

    Returns:
        A factor ready for `squared_norms` and `weighted_sum`.

    Raises:
        Unsupported: uses whose gradients are arranged in different ways.

    Formal guarantees: the result stands for the sum of `factors`, example by example; what cannot
    be joined exactly is refused.
    """
    if any(hasattr(f, "joined") for f in factors):
        # A factor from another room, which alone knows how its calls add up.
        if any(type(f) is not type(factors[0]) for f in factors):
            raise Unsupported("one variable is used by layers of different kinds (tied weights)")
        return factors[0].joined(factors)
    lookups = [f for f in factors if isinstance(f, Lookup)]
    outers = [f for f in factors if isinstance(f, Outer)]
    if lookups and len(lookups) + len(outers) == len(factors):
        lookup = _joined_lookups(lookups)
        if not outers:
            return lookup
        if any(f.layout != Layout((lookup.rows, dims(lookup.g)[-1])) for f in outers):
            raise Unsupported("a look-up table is also used in another way (tied weights)")
        return Tied(lookup, _joined_outers(outers)).resolved()
    if lookups:
        raise Unsupported("a look-up table is also used in another way (tied weights)")
    if any(f.layout != factors[0].layout for f in factors):
        raise Unsupported("one variable is used by layers of different kinds (tied weights)")
    if len(outers) == len(factors):
        return _joined_outers(outers).resolved()
    rows = [f.as_rows() if isinstance(f, Outer) else f for f in factors]
    if any(r.values.shape[1:] != rows[0].values.shape[1:] for r in rows):
        raise Unsupported("one variable is used by layers of different kinds (tied weights)")
    return Rows(tf.add_n([r.values for r in rows]), rows[0].layout)


def _joined_lookups(lookups: list[Lookup]) -> Lookup:
    if len(lookups) == 1:
        return lookups[0]
    ids = tf.concat([f.ids for f in lookups], axis=1)
    return Lookup(ids, tf.concat([f.g for f in lookups], axis=1), lookups[0].rows)


def _joined_outers(outers: list[Outer]) -> Outer:
    if len(outers) == 1:
        return outers[0]
    a = tf.concat([f.a for f in outers], axis=2)
    return Outer(a, tf.concat([f.g for f in outers], axis=2), outers[0].layout)
