"""Per-example gradients as factors: squared norms and weighted sums, and nothing larger.

A factor stands for the gradients of all examples by one variable. `Rows` holds the gradients
themselves, `Outer` two matrices whose product they are, and `Lookup` the rows of a table that were
read. All of them are float32 (float64 for float64 variables), whatever dtype the model computes in.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Protocol

import tensorflow as tf

from keras_bandmf._keras_internals import keeps_its_message
from keras_bandmf.clipping.shapes import dims, over_rows, product, static

# Below this share of the largest value it could have, a squared norm of float32 is rounding error.
# In float64 it is not. But the floor also bounds how large the terms of a small gradient may be,
# and so how much their rounding disturbs the sum over the batch.
_GRAM_FLOOR = 64.0 * 2.0**-23
#: Norms up to the root of this may be lost, because squares fall below the smallest normal number.
VANISHING = 1e-14
# By how much a float32 sum of vectors may be off, as a share of their lengths.
_SUM_FLOOR = 64.0 * 2.0**-23
#: This many float32 terms are added in a row. The results are added in float64.
BLOCK_ROWS = 16
#: Squares of a norm are added in blocks of at most so many.
NORM_BLOCK = 1024
# Below this, a product of vectors takes longer than squares and their sum.
_SHORT_BLOCK = 64
#: This many terms may be added in a row in float64: rows of a chunk times positions.
LARGEST_CHAIN = 2**20
# Up to this many positions, comparing all pairs of them is faster than sorting.
_FEW_POSITIONS = 64
# Positions assumed when their number is unknown before the graph runs.
_UNKNOWN_POSITIONS = 64


_DIFFERENT_KINDS = "one variable is used by layers of different kinds (tied weights)"


@keeps_its_message
class Unsupported(Exception):
    """This layer or model cannot take the book-keeping path; the message says why."""


class Factor(Protocol):
    """The gradients of all examples by one variable, of one call of a layer or of all calls.

    A rule returns one for each call (`LayerRule.gradients`). Those of a variable that is used in
    several calls add up before the norm is taken (`merge.merged`).

    Formal guarantees: `squared_norms` may be too large, never too small by more than rounding, and
    `weighted_sum` is the sum over the examples of these very gradients.

    Example:
        >>> import tensorflow as tf
        >>> from keras_bandmf import clipping
        >>> def norms(factor: clipping.Factor) -> tf.Tensor:
        ...     return tf.sqrt(factor.squared_norms())
        >>> norms(clipping.Rows(tf.constant([[3.0, 4.0]]))).numpy()
        array([5.], dtype=float32)
    """

    def joined(self, factors: Sequence[Factor]) -> Factor:
        """Returns one factor for the sum of several.

        Args:
            factors: This factor first, then those of the other calls.

        Raises:
            Unsupported: If another factor is of another kind or arranged in another way.
        """

    def grouped(self, size: int, mask: tf.Tensor) -> Factor:
        """Returns one factor for examples of several rows each: the sum of their gradients.

        Formal guarantees: a row that is masked out adds exactly zero, whatever it holds: not even
        a NaN of it reaches the example that it stands with.

        Args:
            size: The number of consecutive rows that are one example.
            mask: Shape (batch,), bool, with a number of rows that is a multiple of `size`.
        """

    def resolved(self) -> Factor:
        """Returns the same gradients in the form that is cheapest to use; often itself."""

    def squared_norms(self) -> tf.Tensor:
        """Returns the squared norm of the gradient of every example, shape (batch,)."""

    def weighted_sum(self, weights: tf.Tensor) -> tf.Tensor:
        """Returns the sum over examples of weight times gradient.

        Args:
            weights: Shape (batch,), of the dtype of the gradients. A gradient whose weight is not
                positive adds exactly zero, whatever it is.

        Returns:
            The sum, in the shape in which the variable is released.
        """


@dataclasses.dataclass(frozen=True)
class Layout:
    """How a (groups, in, out) sum of products becomes the shape of the variable.

    Two products may be joined only if their layouts are equal. So this holds values instead of
    being a function.

    Attributes:
        shape: The shape of the variable.
        split: The shape of the sum before its axes are permuted; None if they are in order.
        order: The permutation of the axes of `split`.
    """

    shape: tuple[int, ...]
    split: tuple[int, ...] | None = None
    order: tuple[int, ...] | None = None

    def __call__(self, total: tf.Tensor) -> tf.Tensor:
        """Returns the sum in the variable's shape."""
        if self.split is not None:
            total = tf.transpose(tf.reshape(total, self.split), self.order)
        return tf.reshape(total, self.shape)


def _weighted(values: tf.Tensor, weights: tf.Tensor) -> tf.Tensor:
    """Returns rows of `values` times `weights`: exactly zero where the weight is not positive."""
    weights = tf.where(weights > 0, weights, tf.zeros_like(weights))
    # Here 0 * NaN is zero. Selecting rows by `tf.where`, broadcast, takes twice as long.
    return tf.math.multiply_no_nan(values, over_rows(weights, values))


def _kept(values: tf.Tensor, weights: tf.Tensor) -> tf.Tensor:
    """Returns `values` with the rows whose weight is not positive replaced by zeros."""
    return _weighted(values, tf.cast(weights > 0, values.dtype))


def grouped_positions(values: tf.Tensor, size: int, mask: tf.Tensor) -> tf.Tensor:
    """Returns the positions of rows that are one example one after another, as one row.

    Args:
        values: Shape (rows, positions, width) or (rows, groups, positions, width), floating.
        size: The number of consecutive rows that are one example.
        mask: Shape (rows,), bool. The positions of a row that is masked out become zeros.

    Returns:
        The same with `rows / size` rows of `size * positions` positions.
    """
    values = _weighted(values, tf.cast(mask, values.dtype))
    rows, *groups, count, width = dims(values)
    shape = [rows // size, *groups, size * count, width]
    if not groups or static(groups[0]) == 1:
        return tf.reshape(values, shape)
    apart = tf.reshape(values, [rows // size, size, *groups, count, width])
    return tf.reshape(tf.transpose(apart, [0, 2, 1, 3, 4]), shape)


class Rows:
    """Per-example gradients that are written out.

    Args:
        values: Shape (batch, ...), float32 or float64: the gradient of every example.
        layout: How their sum becomes the shape of the variable; None if it has that shape. Layouts
            are compared when gradients are joined, so give a `Layout` or another function with
            equality.

    Example:
        >>> import tensorflow as tf
        >>> from keras_bandmf import clipping
        >>> rows = clipping.Rows(tf.constant([[3.0, 4.0], [0.0, 1.0]]))
        >>> rows.squared_norms().numpy()
        array([25.,  1.], dtype=float32)
        >>> rows.weighted_sum(tf.constant([0.2, 1.0])).numpy().round(6)
        array([0.6, 1.8])
    """

    def __init__(self, values: tf.Tensor, layout: Callable[[tf.Tensor], tf.Tensor] | None = None):
        self.values = values
        self.layout = layout

    def squared_norms(self) -> tf.Tensor:
        """Returns the squared norm of every example's gradient, shape (batch,).

        Formal guarantees: of N numbers, rounding takes away at most (`NORM_BLOCK` + 2 N /
        `NORM_BLOCK` + 3) 2^-24 of it in float32, and half of that of the norm, in whatever order a
        processor adds: no square is rounded more often, in its block, in the sum over blocks, and
        where the rest is added. Of 10^7 equal numbers 1e-5 of the norm were measured. Without
        blocks, XLA takes away 1e-4. Where N is not known before the graph runs, there are none.
        """
        batch, *sizes = dims(self.values)
        count = static(product(sizes))
        if count is None or count < _SHORT_BLOCK:
            return tf.reduce_sum(tf.square(self.values), axis=list(range(1, len(sizes) + 1)))
        flat = tf.reshape(self.values, [batch, count])
        length = _block_length(count)
        blocks = count // length
        rest = flat[:, blocks * length :]
        flat = flat if blocks * length == count else flat[:, : blocks * length]
        # Products of vectors: squares would be as many numbers again, written and read.
        flat = tf.reshape(flat, [batch * blocks, 1, length])
        squared = tf.reshape(tf.matmul(flat, flat, transpose_b=True), [batch, blocks])
        return tf.reduce_sum(squared, axis=1) + tf.reduce_sum(tf.square(rest), axis=1)

    def weighted_sum(self, weights: tf.Tensor) -> tf.Tensor:
        """Returns the sum over examples of weight times gradient: the variable's shape, float64."""
        sizes = dims(self.values)
        flat = tf.reshape(self.values, [sizes[0], product(sizes[1:])])
        total = tf.reshape(_total_of_blocks(_kept(flat, weights), weights), sizes[1:])
        return total if self.layout is None else self.layout(total)

    def joined(self, factors: Sequence[Factor]) -> Rows:
        """Returns the sum of gradients that are all written out in the same layout."""
        rows = [factor for factor in factors if isinstance(factor, Rows)]
        if len(rows) < len(factors) or any(f.layout != self.layout for f in rows):
            raise Unsupported(_DIFFERENT_KINDS)
        if any(f.values.shape[1:] != self.values.shape[1:] for f in rows):
            raise Unsupported(_DIFFERENT_KINDS)
        return Rows(tf.add_n([f.values for f in rows]), self.layout)

    def grouped(self, size: int, mask: tf.Tensor) -> Rows:
        """Returns the sums over the rows of each example."""
        values = _weighted(self.values, tf.cast(mask, self.values.dtype))
        sizes = dims(values)
        apart = tf.reshape(values, [sizes[0] // size, size, *sizes[1:]])
        return Rows(tf.reduce_sum(apart, axis=1), self.layout)

    def resolved(self) -> Rows:
        """Returns itself: nothing is cheaper than gradients that are written out."""
        return self


def _block_length(count: int) -> int:
    """Returns the largest divisor up to `NORM_BLOCK`, or `NORM_BLOCK` if that is below its half.

    A divisor leaves no rest, which would cost a copy; short blocks would be too many to add up.
    """
    longest = min(NORM_BLOCK, count)
    return next((k for k in range(longest, longest // 2, -1) if count % k == 0), longest)


def _total_of_blocks(values: tf.Tensor, weights: tf.Tensor) -> tf.Tensor:
    """Returns the sum over rows of weight times row, float64.

    Formal guarantees: of N rows in float32, off by at most (`BLOCK_ROWS` + 2) 2^-24 times the sum
    of weight times norm of a row, whatever the rows and their order: `BLOCK_ROWS` roundings in a
    block, one where the total becomes float32 again, and one to spare for float64. A product of
    matrices adds all N in a row, and may be off by N 2^-24 times that: 16,384 equal rows were off
    by a whole one.
    """
    if values.dtype == tf.float64:
        return tf.linalg.matvec(values, weights, transpose_a=True)
    count, width = dims(values)
    blocks = count // BLOCK_ROWS
    whole = blocks * BLOCK_ROWS
    sums = tf.matmul(
        tf.reshape(weights[:whole], [blocks, 1, BLOCK_ROWS]),
        tf.reshape(values[:whole], [blocks, BLOCK_ROWS, width]),
    )
    rest = tf.matmul(weights[None, whole:], values[whole:])[0]
    return tf.reduce_sum(tf.cast(sums, tf.float64), axis=[0, 1]) + tf.cast(rest, tf.float64)


class Outer:
    """Per-example gradients of a matrix as products a'g, which are written out only where cheaper.

    The norms come from Gram matrices otherwise: |a'g|^2 is the sum over positions s, t of
    (a_s . a_t)(g_s . g_t) (Li et al., "Large Language Models Can Be Strong Differentially Private
    Learners", 2022).

    Args:
        a: Shape (batch, groups, positions, in): the inputs.
        g: Shape (batch, groups, positions, out), of the same dtype: the output gradients.
        layout: How the (groups, in, out) sum becomes the shape of the variable.

    Example:
        >>> import tensorflow as tf
        >>> from keras_bandmf import clipping
        >>> from keras_bandmf.clipping.factors import Layout
        >>> a, g = tf.constant([[[[1.0, 2.0]]]]), tf.constant([[[[3.0]]]])
        >>> outer = clipping.Outer(a, g, Layout((2, 1)))
        >>> outer.squared_norms().numpy()
        array([45.], dtype=float32)
        >>> outer.weighted_sum(tf.constant([1.0])).numpy()
        array([[3.],
               [6.]], dtype=float32)
    """

    def __init__(self, a: tf.Tensor, g: tf.Tensor, layout: Layout):
        self.a = a
        self.g = g
        self.layout = layout

    def joined(self, factors: Sequence[Factor]) -> Outer:
        """Returns the sum of products in the same layout: their positions one after another."""
        outers = [factor for factor in factors if isinstance(factor, Outer)]
        if len(outers) < len(factors) or any(f.layout != self.layout for f in outers):
            raise Unsupported(_DIFFERENT_KINDS)
        if len(outers) == 1:
            return self
        a = tf.concat([f.a for f in outers], axis=2)
        return Outer(a, tf.concat([f.g for f in outers], axis=2), self.layout)

    def grouped(self, size: int, mask: tf.Tensor) -> Outer:
        """Returns products over the positions of all rows of each example."""
        a, g = (grouped_positions(part, size, mask) for part in (self.a, self.g))
        return Outer(a, g, self.layout)

    def resolved(self) -> Rows | Outer:
        """Returns `Rows` if writing the product out is the cheaper way to the norm, else itself."""
        _, _, count, width = dims(self.a)
        return self.as_rows() if prefers_product(count, width, dims(self.g)[-1]) else self

    def as_rows(self) -> Rows:
        """Returns the products written out: (batch, groups, in, out)."""
        if self.a.shape[1] == 1:
            values = tf.matmul(self.a[:, 0], self.g[:, 0], transpose_a=True)[:, None]
        else:
            values = tf.matmul(self.a, self.g, transpose_a=True)
        return Rows(values, self.layout)

    def squared_norms(self) -> tf.Tensor:
        """Returns the squared norms, (batch,), by Gram matrices."""
        return floored(*self.gram())

    def gram(self) -> tuple[tf.Tensor, tf.Tensor]:
        """Returns (the squared norms up to rounding, the largest possible norms), both (batch,)."""
        a_lengths, g_lengths = _lengths(self.a), _lengths(self.g)
        bound = tf.reduce_sum(tf.sqrt(a_lengths * g_lengths), axis=[1, 2])
        if static(dims(self.a)[2]) == 1:
            exact = tf.reduce_sum(a_lengths * g_lengths, axis=[1, 2])
        else:
            grams = tf.matmul(self.a, self.a, transpose_b=True)
            grams *= tf.matmul(self.g, self.g, transpose_b=True)
            exact = tf.reduce_sum(grams, axis=[1, 2, 3])
        # Squares of one matrix may vanish although the other is so large that the product counts.
        # Then a coarse bound, with the most that each entry may lose, is used: it can only clip
        # more.
        largest = tf.reduce_max(tf.maximum(a_lengths, g_lengths), axis=[1, 2])
        dtype = self.a.dtype
        _, groups, count, width = dims(self.a)
        widths = tf.cast(width, dtype), tf.cast(dims(self.g)[-1], dtype)
        a_most, g_most = (
            tf.sqrt(lengths + _tiny(dtype) * size)
            for lengths, size in zip((a_lengths, g_lengths), widths, strict=True)
        )
        coarse = tf.reduce_sum(a_most * g_most, axis=[1, 2])
        terms = tf.cast(groups * count, dtype)
        entries = terms * terms * (widths[0] + widths[1])
        may_vanish = largest > VANISHING / _tiny(dtype) / entries
        return tf.where(may_vanish, tf.square(coarse), exact), bound

    def weighted_sum(self, weights: tf.Tensor) -> tf.Tensor:
        """Returns the sum over examples of weight times a'g, in the shape of the variable."""
        _check_chain(self.a)
        a, g = _kept(self.a, weights), _weighted(self.g, weights)
        if a.shape[1] == 1:
            total = tf.matmul(_flat(a), _flat(g), transpose_a=True)[None]
        else:
            total = tf.einsum("bgti,bgto->gio", a, g)
        return self.layout(total)


class Lookup:
    """Per-example gradients of a table: example i adds g[i, t] to row ids[i, t].

    Args:
        ids: Shape (batch, positions), int32: the rows that were read.
        g: Shape (batch, positions, width): the gradient by what was read.
        rows: The number of rows of the table.

    Example:
        >>> import tensorflow as tf
        >>> from keras_bandmf import clipping
        >>> lookup = clipping.Lookup(tf.constant([[0, 2, 0]]), tf.ones((1, 3, 1)), rows=3)
        >>> lookup.squared_norms().numpy()
        array([5.], dtype=float32)
        >>> lookup.weighted_sum(tf.constant([1.0])).numpy()
        array([[2.],
               [0.],
               [1.]])
    """

    def __init__(self, ids: tf.Tensor, g: tf.Tensor, rows: int):
        self.ids = ids
        self.g = g
        self.rows = rows

    def joined(self, factors: Sequence[Factor]) -> Lookup:
        """Returns the sum of look-ups in one table: their positions one after another."""
        lookups = [factor for factor in factors if isinstance(factor, Lookup)]
        if len(lookups) < len(factors):
            raise Unsupported(_DIFFERENT_KINDS)
        if len(lookups) == 1:
            return self
        ids = tf.concat([f.ids for f in lookups], axis=1)
        return Lookup(ids, tf.concat([f.g for f in lookups], axis=1), self.rows)

    def grouped(self, size: int, mask: tf.Tensor) -> Lookup:
        """Returns the look-ups of all rows of each example; a row masked out adds zeros."""
        rows, count = dims(self.ids)
        ids = tf.reshape(self.ids, [rows // size, size * count])
        return Lookup(ids, grouped_positions(self.g, size, mask), self.rows)

    def resolved(self) -> Lookup:
        """Returns itself: the table is never written out for each example."""
        return self

    def squared_norms(self) -> tf.Tensor:
        """Returns squared norms, (batch,); positions that read the same row are added up first.

        Formal guarantees: positions are added up in float64, as in `weighted_sum`. In float32 a
        thousand small gradients beside a large one are lost one by one, and the norm that is
        clipped by would miss what the sum then adds.
        """
        count = dims(self.ids)[1]
        known = static(count)
        if known == 1:
            return tf.reduce_sum(tf.square(self.g), axis=[1, 2])
        if known is not None and known <= _FEW_POSITIONS:
            exact = self._by_pairs()
        else:
            exact = self._by_order()
        # `weighted_sum` rounds in another way, so what remains of large vectors that cancel may
        # be larger there.
        share = _GRAM_FLOOR**0.5 if self.g.dtype == tf.float64 else _SUM_FLOOR
        rounding = share * tf.reduce_sum(tf.norm(self.g, axis=-1), 1)
        return tf.where(tf.math.is_nan(exact), exact, tf.maximum(exact, tf.square(rounding)))

    def _by_pairs(self) -> tf.Tensor:
        """Adds up, at every position, all that read its row; c of them count that row once."""
        same = tf.cast(self.ids[:, :, None] == self.ids[:, None, :], tf.float64)
        added = tf.reduce_sum(tf.square(tf.matmul(same, tf.cast(self.g, tf.float64))), axis=2)
        squared = tf.reduce_sum(added / tf.reduce_sum(same, axis=2), axis=1)
        return tf.cast(squared, self.g.dtype)

    def _by_order(self) -> tf.Tensor:
        """Sorts positions by row, and adds up neighbors."""
        batch, count = dims(self.ids)
        order = tf.argsort(self.ids, axis=1)
        ids = tf.gather(self.ids, order, batch_dims=1)
        starts = count * tf.range(batch)[:, None]
        # Each is compared with the position before it. `roll` also takes an empty sequence.
        new = tf.logical_and(ids != tf.roll(ids, 1, axis=1), tf.range(count) > 0)
        segments = tf.cumsum(tf.cast(new, tf.int32), axis=1)
        # Back to the order of the positions, so that integers are moved and not gradients.
        back = tf.math.invert_permutation(tf.reshape(order + starts, [batch * count]))
        segments = tf.gather(tf.reshape(segments + starts, [batch * count]), back)
        width = dims(self.g)[-1]
        g = tf.cast(tf.reshape(self.g, [batch * count, width]), tf.float64)
        added = tf.math.unsorted_segment_sum(g, segments, batch * count)
        squared = tf.reduce_sum(tf.square(tf.reshape(added, [batch, count, width])), axis=[1, 2])
        return tf.cast(squared, self.g.dtype)

    def weighted_sum(self, weights: tf.Tensor) -> tf.Tensor:
        """Returns the sum over examples of weight times gradient, dense: (rows, width), float64."""
        _check_chain(self.g)
        sizes = dims(self.g)
        # In float64, because a row that many positions read is a long chain of additions; weights
        # too, because what rounding adds to each of them adds up.
        g, weights = tf.cast(self.g, tf.float64), tf.cast(weights, tf.float64)
        flat = tf.reshape(_weighted(g, weights), [sizes[0] * sizes[1], sizes[2]])
        ids = tf.reshape(self.ids, [sizes[0] * sizes[1]])
        return tf.math.unsorted_segment_sum(flat, ids, self.rows)


def _check_chain(stacked: tf.Tensor) -> None:
    """Refuses float64 sums so long that their rounding would count."""
    rows, positions = static(dims(stacked)[0]), static(dims(stacked)[-2])
    if stacked.dtype != tf.float64 or rows is None or positions is None:
        return
    if rows * positions > LARGEST_CHAIN:
        raise ValueError(
            f"Expected at most {LARGEST_CHAIN} rows times positions in a float64 sum. "
            f"Received: {rows} rows of {positions} positions. Pass a smaller "
            "`microbatch_size` to `privatize` or `clipped_gradients`."
        )


def prefers_product(count: object, width_in: int, width_out: int) -> bool:
    """Returns whether the product a'g of an example should be written out.

    That avoids the Gram matrices and gives the clipped sum almost for free. It pays while the
    product is not much larger than the activations and gradients it is made of.

    Args:
        count: The number of positions of an example: an int, or a tensor if it is unknown before
            the graph runs.
        width_in: The number of columns of a.
        width_out: The number of columns of g.
    """
    known = static(count) or _UNKNOWN_POSITIONS
    if known == 1:
        return False
    return width_in * width_out <= 2 * known * (width_in + width_out)


def floored(exact: tf.Tensor, bound: tf.Tensor) -> tf.Tensor:
    """Returns squared norms that rounding cannot have understated.

    Terms that cancel leave only rounding error, which could hide a large gradient. The floor keeps
    the norm from being understated, so the clip still holds.

    Args:
        exact: Shape (batch,), squared norms as a sum of terms that may cancel.
        bound: Shape (batch,), the norms there would be if nothing canceled.
    """
    floor = _GRAM_FLOOR * tf.square(bound)
    # A NaN stays a NaN: the example is dropped, not clipped.
    return tf.where(tf.logical_or(exact > floor, tf.math.is_nan(exact)), exact, floor)


def _lengths(matrix: tf.Tensor) -> tf.Tensor:
    return tf.reduce_sum(tf.square(matrix), axis=-1)


def _flat(stacked: tf.Tensor) -> tf.Tensor:
    batch, _, count, width = dims(stacked)
    return tf.reshape(stacked, [batch * count, width])


def _tiny(dtype: tf.DType) -> float:
    return 2.0**-1022 if dtype == tf.float64 else 2.0**-126
