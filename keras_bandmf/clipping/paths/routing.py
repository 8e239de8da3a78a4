"""Which path a model takes: decided by its layers, by a trial trace, and by `check_model`."""

from __future__ import annotations

from typing import Any, NamedTuple

import keras
import tensorflow as tf

from keras_bandmf.clipping.checks.captures import refuse_products
from keras_bandmf.clipping.clipper import Clipper
from keras_bandmf.clipping.factors import Unsupported
from keras_bandmf.clipping.losses import batch_loss, overrides_compute_loss
from keras_bandmf.clipping.paths.book_keeping import clip_by_book_keeping
from keras_bandmf.clipping.paths.declared_shapes import checked_shapes
from keras_bandmf.clipping.rowwise.decision import advice, rowwise
from keras_bandmf.clipping.rules.registry import assigned_rules
from keras_bandmf.clipping.shapes import on_tensors

# The number of rows of the trial trace: a prime that no other axis is likely to have, so that an
# axis of this size is the example axis.
TRIAL_ROWS = 1009
_ATTRIBUTE = "_bandmf_route"


class Route(NamedTuple):
    """A decision about one model: valid while `key` is."""

    key: tuple
    general: str | None  # why the model takes the general path; None for book-keeping
    checked: bool  # whether `check_model` compared numbers


def route_of(model: keras.Model, x: Any, y: Any, sample_weight: Any, loss: Any) -> Route:
    """Returns the path that `model` takes on data like this.

    The decision of `check_model` holds while the trainable variables are the same; without it the
    layers are looked at, and the model is traced once on symbolic data.

    Args:
        model: A built model.
        x: The inputs, tensors. Only dtypes and shapes matter, here and below.
        y: The targets, or None.
        sample_weight: The weights, or None.
        loss: See `clipped_gradients`.
    """
    known = stored(model)
    if known is not None and known.checked and known.key == _variables_key(model):
        return known
    key = data_key(model, x, y, sample_weight, loss)
    if known is not None and known.key == key:
        return known
    general = structural_reason(model, loss) or trial_reason(model, x, y, sample_weight, loss)
    route = Route(key, general, checked=False)
    _store(model, route)
    return route


def stored(model: keras.Model) -> Route | None:
    """Returns the last decision about `model`, if any."""
    return vars(model).get(_ATTRIBUTE)


def store_checked(model: keras.Model, general: str | None) -> Route:
    """Keeps the verdict of `check_model` with the model."""
    route = Route(_variables_key(model), general, checked=True)
    _store(model, route)
    return route


def give_up(model: keras.Model, reason: str) -> None:
    """Sends `model` to the general path from here on: book-keeping failed on a real trace."""
    known = stored(model)
    if known is not None:
        _store(model, known._replace(general=reason))


def structural_reason(model: keras.Model, loss: Any) -> str | None:
    """Returns why the layers alone send the model to the general path, or None.

    Formal guarantees: of None, that every layer and operation of the model is known to treat rows
    independently, or declared to. The general path works on one row at a time and mixes none. No
    data is looked at.
    """
    if loss is None and overrides_compute_loss(model):
        return f"{type(model).__name__} overrides `compute_loss`"
    unknown = rowwise(model).unknown
    if unknown:
        return advice(unknown)
    return "; ".join(assigned_rules(model).missing) or None


def trial_reason(model: keras.Model, x: Any, y: Any, sample_weight: Any, loss: Any) -> str | None:
    """Returns why the book-keeping path cannot be traced, or None.

    Raises:
        PrivacyError: If it has products that may mix rows (`tiles`). Of an eager run this is the
            only graph that is looked at: it must not compute otherwise later.
    """
    try:
        graph = trial_graph(model, x, y, sample_weight, loss)
    except Unsupported as reason:
        return str(reason)
    refuse_products(graph)
    return None


def trial_graph(
    model: keras.Model,
    x: Any,
    y: Any,
    sample_weight: Any,
    loss: Any,
    rows: int = TRIAL_ROWS,
    float64_sums: bool = False,
) -> tf.Graph:
    """Traces the book-keeping path on so many symbolic rows that no other axis has that size.

    Formal guarantees: of a graph, that every tensor between the layers of functional models has the
    shape that the model declared, and the rows on axis 0 (`checked_shapes`). Each trace that trains
    is looked at in the same way, as far as its sizes are known.

    Raises:
        Unsupported: If the model cannot take this path.
    """

    def spec(t: tf.Tensor) -> tf.TensorSpec:
        return tf.TensorSpec([rows, *t.shape[1:]], t.dtype)

    leaves = [t for t in keras.tree.flatten((x, y, sample_weight)) if t is not None]
    row_loss = batch_loss(model, loss)

    def trial(tensors: list[tf.Tensor]) -> list[tf.Tensor]:
        given = iter(tensors)
        data = on_tensors(lambda _: next(given), (x, y, sample_weight))
        mask = tf.ones([rows], tf.bool)
        clipper = Clipper.of(model, float64_sums=float64_sums)
        with checked_shapes(model, rows):
            found = clip_by_book_keeping(model, data[0], data[1], data[2], mask, clipper, row_loss)
        return [t for t in keras.tree.flatten(tuple(found)) if t is not None]

    # Not under `tf.init_scope`, which stops tapes: every gradient would be None.
    traced = tf.function(trial, autograph=False)
    return traced.get_concrete_function([spec(t) for t in leaves]).graph


def data_key(model: keras.Model, x: Any, y: Any, sample_weight: Any, loss: Any) -> tuple:
    """Returns what a trial trace depends on."""
    shapes = tuple(
        None if t is None else (t.dtype, tuple(t.shape[1:]))
        for t in keras.tree.flatten((x, y, sample_weight))
    )
    return (*_variables_key(model), shapes, _loss_key(loss))


def _variables_key(model: keras.Model) -> tuple:
    return tuple(id(v) for v in model.trainable_variables)


def _loss_key(loss: Any) -> Any:
    return loss if loss is None or isinstance(loss, str) else id(loss)


def _store(model: keras.Model, route: Route) -> None:
    # Bypasses Keras's attribute tracking, which would wrap the tuple or, once built, refuse it.
    object.__setattr__(model, _ATTRIBUTE, route)
