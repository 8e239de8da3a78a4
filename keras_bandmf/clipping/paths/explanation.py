"""`explain`: which path each layer takes, and why, as a table."""

from __future__ import annotations

import dataclasses
from typing import Literal

import keras

from keras_bandmf._keras_internals import all_layers, own_weights, trained_layers
from keras_bandmf.clipping.paths.routing import stored, structural_reason
from keras_bandmf.clipping.rules.base import LayerRule
from keras_bandmf.clipping.rules.by_example import ByExampleRule
from keras_bandmf.clipping.rules.registry import rule_of

#: How a model gets its clipped gradients.
ModelRoute = Literal["book-keeping", "general"]
#: How a layer does. "by example": it alone runs one example at a time. "none": nothing is trained.
LayerRoute = Literal["book-keeping", "by example", "general", "none"]


@dataclasses.dataclass(frozen=True)
class Explanation:
    """What `explain` returns. `str()` of it is a table.

    Attributes:
        rows: (path, layer class, route, reason) of every layer that owns weights. The route is
            "book-keeping", "by example" (this layer alone is run one example at a time), "general",
            or "none" for a frozen layer.
        route: The route of the whole model: "book-keeping" or "general".
        why: The reason for it.

    Example:
        >>> import keras
        >>> import keras_bandmf as bandmf
        >>> model = keras.Sequential([keras.Input((3,)), keras.layers.Dense(2, name="dense")])
        >>> explanation = bandmf.clipping.explain(model)
        >>> explanation.route, explanation.why
        ('book-keeping', 'by its layers; not checked yet')
    """

    rows: list[tuple[str, str, LayerRoute, str]]
    route: ModelRoute
    why: str

    def __str__(self) -> str:
        table = [("layer", "class", "route", "why"), *self.rows]
        widths = [max(len(row[i]) for row in table) for i in range(3)]
        lines = [
            "  ".join([*(c.ljust(w) for c, w in zip(row, widths, strict=False)), row[3]])
            for row in table
        ]
        lines.insert(1, "-" * max(len(line) for line in lines))
        return "\n".join([*lines, f"model: {self.route} path ({self.why})"])


def explain(model: keras.Model) -> Explanation:
    """Explains which path each layer of a model takes to its clipped gradients, and why.

    The layers decide first, and then what `check_model` or the last `clipped_gradients` found out.
    A layer that treats rows independently and has no rule is run one example at a time by itself
    ("by example"). A single layer on the general path takes the whole model there: all of it runs
    one example at a time, which is exact and slow.

    Args:
        model: A built Keras model.

    Returns:
        An `Explanation`. Print it.

    Example:
        >>> import keras
        >>> import keras_bandmf as bandmf
        >>> layers = [keras.layers.Dense(8, name="dense"), keras.layers.Dense(1, name="head")]
        >>> model = keras.Sequential([keras.Input((3,)), *layers], name="classifier")
        >>> print(bandmf.clipping.explain(model))
        layer             class  route         why
        ------------------------------------------------
        classifier/dense  Dense  book-keeping  DenseRule
        classifier/head   Dense  book-keeping  DenseRule
        model: book-keeping path (by its layers; not checked yet)
    """
    trained = {id(layer) for layer in trained_layers(model)}
    rows: list[tuple[str, str, LayerRoute, str]] = []
    inside: dict[int, tuple[LayerRoute, str]] = {}
    for layer in all_layers(model):  # outer layers come before those inside them
        rule, why = rule_of(layer)
        if id(layer) in inside:
            route, why = inside[id(layer)]
        else:
            route = _route(rule)
            if rule is not None and rule.whole:
                for part in all_layers(layer, include_self=False):
                    inside[id(part)] = route, f"{why} of {layer.path}"
        if not own_weights(layer):
            continue
        if id(layer) not in trained:
            route, why = "none", "nothing to train"
        rows.append((layer.path, type(layer).__name__, route, why))
    known = stored(model)
    general = structural_reason(model, None) or (known.general if known is not None else None)
    if general is not None:
        return Explanation(rows, "general", general)
    checked = known is not None and known.checked
    why = "checked against one example at a time" if checked else "by its layers; not checked yet"
    return Explanation(rows, "book-keeping", why)


def _route(rule: LayerRule | None) -> LayerRoute:
    if rule is None:
        return "general"
    return "by example" if isinstance(rule, ByExampleRule) else "book-keeping"
