"""A batch in chunks: sums added up, rows put back together, memory of one chunk."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import keras
import tensorflow as tf

from keras_bandmf.clipping.paths.book_keeping import Clipped
from keras_bandmf.clipping.shapes import by_example, dims, merge_rows, on_tensors

ChunkFunction = Callable[[Any, Any, Any, tf.Tensor], Clipped]


def clip_in_chunks(
    clip_chunk: ChunkFunction,
    x: Any,
    y: Any,
    sample_weight: Any,
    mask: tf.Tensor,
    size: int,
) -> Clipped:
    """Runs `clip_chunk` over equal chunks of at most `size` examples, the last one padded.

    Padding is masked copies of the first example: a model may refuse rows that no data set holds,
    as look-ups do. A chunk of several rows gets one more, masked: a copy of a row of the next
    chunk. What it shows is in `clip_by_book_keeping`.

    Args:
        clip_chunk: A function (x, y, sample_weight, mask) of one chunk that returns `Clipped`.
        x: The inputs, a structure of tensors with the example on axis 0, as all data here.
        y: The targets, or None.
        sample_weight: The weights, or None.
        mask: Shape (batch,), bool.
        size: The largest number of examples in a chunk.

    Returns:
        `Clipped` of the whole batch: the same as that of one chunk of everything.
    """
    batch = dims(mask)[0]
    # An empty batch is one chunk of padding.
    count = -(-batch // size)
    count = _at_least_one(count)
    if size > 1:
        # As few rows of padding as possible: a small batch must not pay for a large chunk.
        size = _at_least_one(-(-batch // count))
    missing = count * size - batch
    rows = on_tensors(lambda t: _with_copies(t, missing), (x, y, sample_weight))
    parts = on_tensors(lambda t: _parts(t, count, size), (*rows, _padded(mask, missing)))

    watched = isinstance(size, tf.Tensor) or size > 1

    def chunk(i: Any) -> Clipped:
        rows = on_tensors(lambda t: tf.gather(t, i), parts)
        if not watched:
            return clip_chunk(*rows)
        others = on_tensors(lambda t: tf.gather(t, (i + 1) % count)[:1], parts)
        others = (*others[:3], tf.zeros_like(others[3]))
        rows = keras.tree.map_structure(_appended, rows, others)
        clipped = clip_chunk(*rows)
        return _with_rows(clipped, [t[:-1] for t in _rows(clipped)])

    # The first chunk, run by itself, shows what the others will return.
    first = chunk(0)
    sums, columns = _stacked(*_sums_and_rows(first), lambda i: _sums_and_rows(chunk(i)), count)
    rows = [tf.reshape(c, [count * size, *dims(c)[2:]])[:batch] for c in columns]
    first = first._replace(sums=sums[:-1], rows_mixed=sums[-1] > 0)
    return _with_rows(first, rows)


def clip_at_once(
    clip_batch: ChunkFunction, x: Any, y: Any, sample_weight: Any, mask: tf.Tensor
) -> Clipped:
    """Runs `clip_batch` on the whole batch. An empty one gets a masked row of zeros meanwhile.

    Some operations, convolutions among them, do not take zero rows. No batch of a plan is empty:
    it has masked rows of the data (`sampling.batches`).

    The arguments are those of `clip_in_chunks`.

    Returns:
        `Clipped` of the batch.
    """
    data = (x, y, sample_weight, mask)
    batch, extra = dims(mask)[0], _missing_row(mask)
    if isinstance(batch, int) and batch > 0:
        return clip_batch(*data)
    clipped = clip_batch(*on_tensors(lambda t: _padded(t, extra), data))
    return _with_rows(clipped, [t[:batch] for t in _rows(clipped)])


def in_rows(clip: ChunkFunction, rows_per_example: int) -> ChunkFunction:
    """Returns `clip`, a function of rows, as one of examples of several rows.

    Args:
        clip: A function (x, y, sample_weight, mask) of tensors with the row on axis 0.
        rows_per_example: The number of rows of an example.

    Returns:
        The same of tensors of shape (examples, rows of an example, ...). What it returns has an
        axis of examples and one of rows, too, except norms, which belong to examples.
    """

    def clip_examples(x: Any, y: Any, sample_weight: Any, mask: tf.Tensor) -> Clipped:
        data = on_tensors(merge_rows, (x, y, sample_weight, mask))
        return _on_row_columns(clip(*data), lambda t: by_example(t, rows_per_example))

    return clip_examples


def with_merged_rows(clipped: Clipped) -> Clipped:
    """Returns what a function of `in_rows` returned, with the row on axis 0 again."""
    return _on_row_columns(clipped, merge_rows)


def _on_row_columns(clipped: Clipped, function: Callable[[tf.Tensor], tf.Tensor]) -> Clipped:
    """Applies a function to everything that belongs to rows, which norms do not."""
    norms, losses, was_clipped, *rest = _rows(clipped)
    changed = [norms, function(losses), was_clipped, *(function(t) for t in rest)]
    return _with_rows(clipped, changed)


def _with_rows(clipped: Clipped, rows: list[tf.Tensor]) -> Clipped:
    """Returns `clipped` with everything that `_rows` returned replaced."""
    norms, losses, was_clipped, *rest = rows
    both = (clipped.outputs, clipped.attached)
    outputs, attached = keras.tree.pack_sequence_as(both, rest)
    return Clipped(clipped.sums, norms, losses, was_clipped, outputs, attached, clipped.rows_mixed)


def _rows(clipped: Clipped) -> list[tf.Tensor]:
    """Returns everything that has a row per example."""
    columns = [clipped.norms, clipped.losses, clipped.was_clipped]
    return [*columns, *keras.tree.flatten((clipped.outputs, clipped.attached))]


def _sums_and_rows(clipped: Clipped) -> tuple[list[tf.Tensor], list[tf.Tensor]]:
    return [*clipped.sums, tf.cast(clipped.rows_mixed, tf.float32)], _rows(clipped)


def _stacked(
    sums: list[tf.Tensor],
    rows: list[tf.Tensor],
    step: Callable[[Any], tuple[list[tf.Tensor], list[tf.Tensor]]],
    count: Any,
) -> tuple[list[tf.Tensor], list[tf.Tensor]]:
    """Adds up the sums in float64 and stacks the rows of all steps, given those of step 0."""
    arrays = [tf.TensorArray(r.dtype, size=count, element_shape=r.shape).write(0, r) for r in rows]

    def body(i: Any, sums: list[tf.Tensor], arrays: list[tf.TensorArray]) -> tuple:
        added, rows = step(i)
        sums = [s + tf.cast(a, tf.float64) for s, a in zip(sums, added, strict=True)]
        return i + 1, sums, [a.write(i, r) for a, r in zip(arrays, rows, strict=True)]

    # In float64, because a long chain of float32 additions could round by more than is charged.
    sums = [tf.cast(s, tf.float64) for s in sums]
    # One iteration at a time, and none beside step 0, because running several would cost the
    # memory that chunks save.
    with tf.control_dependencies(sums):
        start = tf.identity(1)
    _, sums, arrays = tf.while_loop(
        lambda i, *_: i < count, body, (start, sums, arrays), parallel_iterations=1
    )
    return sums, [a.stack() for a in arrays]


def _appended(rows: tf.Tensor | None, row: tf.Tensor | None) -> tf.Tensor | None:
    return None if rows is None else tf.concat([rows, row], axis=0)


def _with_copies(tensor: tf.Tensor, amount: Any) -> tf.Tensor:
    """Returns rows, and so many copies of the first one; of zeros where there is none."""
    if isinstance(amount, int) and amount == 0:
        return tensor
    first = _padded(tensor, _missing_row(tensor))[:1]
    return tf.concat([tensor, tf.repeat(first, amount, axis=0)], axis=0)


def _padded(tensor: tf.Tensor, amount: Any) -> tf.Tensor:
    """Returns rows, and so many rows of zeros: of False in a mask."""
    if isinstance(amount, int) and amount == 0:
        return tensor
    return tf.pad(tensor, [[0, amount]] + [[0, 0]] * (tensor.shape.rank - 1))


def _missing_row(tensor: tf.Tensor) -> Any:
    """Returns 1 for a tensor without rows, else 0."""
    rows = dims(tensor)[0]
    return max(1 - rows, 0) if isinstance(rows, int) else tf.maximum(1 - rows, 0)


def _parts(tensor: tf.Tensor, count: Any, size: Any) -> tf.Tensor:
    # An axis of chunks instead of slices, because XLA needs slices of constant size.
    return tf.reshape(tensor, [count, size, *dims(tensor)[1:]])


def _at_least_one(count: Any) -> Any:
    return max(count, 1) if isinstance(count, int) else tf.maximum(count, 1)
