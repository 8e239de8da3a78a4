"""Which path each layer takes, and why, as a table."""

from __future__ import annotations

import dataclasses

import keras

from keras_bandmf._keras_internals import all_layers, own_weights, trained_layers
from keras_bandmf.clipping.paths.routing import stored, structural_reason
from keras_bandmf.clipping.rules.registry import rule_of


@dataclasses.dataclass(frozen=True)
class Explanation:
    """What `explain` returns; `str()` is a table.

    Attributes:
        rows: (path, layer class, route, why) of every layer that owns weights; route is
            "book-keeping", "general" or "none" (frozen).
        route: of the whole model: "book-keeping" or "general".
        why: of the whole model.
    """

    rows: list[tuple[str, str, str, str]]
    route: str
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
    """Tell which path each layer of `model` takes to its clipped gradients, and why.

    The layers decide, then what `check_model` or the last `clipped_gradients` found out. One layer
    on the general path takes the whole model there: one example at a time, exact and slow.

    Args:
        model: a built Keras model.

    Returns:
        An `Explanation`; print it.
    """
    trained = {id(layer) for layer in trained_layers(model)}
    rows = []
    for layer in all_layers(model):
        if not own_weights(layer):
            continue
        name = type(layer).__name__
        if id(layer) not in trained:
            rows.append((layer.path, name, "none", "nothing to train"))
            continue
        rule, why = rule_of(layer)
        rows.append((layer.path, name, "general" if rule is None else "book-keeping", why))
    known = stored(model)
    general = structural_reason(model, None) or (known.general if known is not None else None)
    if general is not None:
        return Explanation(rows, "general", general)
    checked = known is not None and known.checked
    why = "checked against one example at a time" if checked else "by its layers; not checked yet"
    return Explanation(rows, "book-keeping", why)
