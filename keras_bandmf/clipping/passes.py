"""One private pass: random numbers from the seeds of the run, and nothing carried to the next."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any, NamedTuple

import keras
import tensorflow as tf

from keras_bandmf._keras_internals import compiled_metrics
from keras_bandmf.clipping.checks.captures import Refused, Watch, written_in
from keras_bandmf.clipping.checks.unseen import unseen
from keras_bandmf.clipping.paths.book_keeping import Clipped
from keras_bandmf.clipping.paths.chunks import ChunkFunction
from keras_bandmf.clipping.seeds import MaskSeeds, drawing, seed_generators
from keras_bandmf.clipping.shapes import dims


class RowsOf(NamedTuple):
    """Inputs and the number of each row in its batch: what tells one pass of a batch from another.

    Attributes:
        x: The inputs, a structure of tensors with the example on axis 0.
        numbers: Shape (rows,), int64.
    """

    x: Any
    numbers: tf.Tensor


def with_row_numbers(x: Any, mask: tf.Tensor) -> RowsOf:
    """Numbers the rows of a batch."""
    return RowsOf(x, tf.range(tf.cast(dims(mask)[0], tf.int64), dtype=tf.int64))


def in_passes(
    clip: ChunkFunction, model: keras.Model, mask_seeds: MaskSeeds | None
) -> ChunkFunction:
    """Returns `clip` for numbered rows: each call is a pass with its own masks.

    Args:
        clip: A function (x, y, sample_weight, mask) that returns `Clipped`.
        model: The model that `clip` is for.
        mask_seeds: See `clipped_gradients`.

    Returns:
        The same of (`RowsOf`, y, sample_weight, mask).

    Formal guarantees: every call of a batch draws from seeds of its own, as the first rows of its
        chunks differ; what it returns is checked by `captures.Watch`.
    """

    def one(numbered: RowsOf, y: Any, sample_weight: Any, mask: tf.Tensor) -> Clipped:
        return private_pass(
            lambda: clip(numbered.x, y, sample_weight, mask),
            model,
            None if mask_seeds is None else mask_seeds.of_pass(numbered.numbers[0]),
        )

    return one


def private_pass(
    run: Callable[[], Any],
    model: keras.Model,
    first: tf.Tensor | None,
    unread: dict[int, str] | None = None,
) -> Any:
    """Runs one pass: draws are answered from `first`, writes and dependences are checked.

    Args:
        run: The forward pass, loss and gradients, or some of them.
        model: The model.
        first: The seed of `MaskSeeds.of_pass`, or None for Keras's own generators.
        unread: See `Watch`.

    Returns:
        What `run` returns.

    Raises:
        Refused: See `captures.Watch.refuse` and `seeds.drawing`.
    """
    watch = Watch(model, first, seed_generators(model), unread)
    with contextlib.nullcontext() if first is None else drawing(model, first):
        results = run()
    watch.refuse(results)
    return results


def traced_pass(
    run: Callable[..., Any], model: keras.Model, *data: Any, unread: dict[int, str] | None = None
) -> tf.Graph | Exception:
    """Traces a private pass without running it, to see what it does.

    Args:
        run: The forward pass or loss, a function of structures like `data`.
        model: The model.
        *data: Structures of tensors, of which only shapes and dtypes are used.
        unread: See `Watch`.

    Returns:
        The graph, or the error of a pass that cannot be traced.

    Raises:
        Refused: See `private_pass`.
    """

    def trace(*data: Any) -> Any:
        # In place of a seed of the run: what is traced here never runs.
        first = tf.identity(tf.zeros([], tf.uint64))
        private_pass(lambda: run(*data), model, first, unread)

    try:
        return unseen(trace, *data).graph
    except Refused:
        raise
    except Exception as error:
        return error


def written_by_metrics(
    model: keras.Model, x: Any, y: Any, y_pred: Any, sample_weight: Any
) -> dict[int, str]:
    """Returns what the compiled metrics write, their own variables and others; see `written_in`.

    The arguments are structures of tensors, of which only shapes and dtypes are used.

    Formal guarantees: empty if the metrics are not built yet, which `fit` does, or cannot be
    traced: they run eagerly then, and what they write is out of sight.
    """
    compiled = compiled_metrics(model)
    if compiled is None or not compiled.built:
        return {}

    def run(x: Any, y: Any, y_pred: Any, sample_weight: Any) -> list:
        model.compute_metrics(x, y, y_pred, sample_weight)
        return []

    try:
        return written_in(unseen(run, x, y, y_pred, sample_weight).graph)
    except Exception:
        return {}


def refuse_untraceable(what: str, error: Exception) -> None:
    """Refuses a model or a loss that runs only eagerly: what it reads and writes is unknown.

    Raises:
        Refused: Always.
    """
    raise Refused(
        f"{what} must be traceable by `tf.function`: what it reads and writes is looked up in its "
        "graph. Replace Python code that looks at values (`float(x)`, `x.numpy()`, `if x > 0`) by "
        f"TensorFlow or `keras.ops`. Received: {type(error).__name__}: {error}"
    ) from error
