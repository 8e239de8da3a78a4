"""The weights of examples, checked and multiplied by the weights of their classes."""

from __future__ import annotations

from typing import Any

import numpy as np

from keras_bandmf._checks import checked_float, checked_int
from keras_bandmf.sampling.sources import map_leaves

# From here on, float32 rounds to infinity.
_FLOAT32_LIMIT = 2.0**128 - 2.0**103


def weighted(columns: dict[str, Any], class_weight: dict[int, float] | None) -> dict[str, Any]:
    """Returns columns whose sample weights are checked, and multiplied by those of the classes.

    Args:
        columns: Dict of structures of arrays with as many rows each.
        class_weight: Dict of class number to weight, or None.

    Returns:
        The columns, with a new `"sample_weight"` in float32 where there are weights of any kind.

    Raises:
        TypeError: `class_weight` is not a dict of numbers, or `y` is not a single array.
        ValueError: A weight is negative, a weight or a product of two is not finite in float32,
            or `y` holds no class numbers.
    """
    weights = [columns["sample_weight"]] if "sample_weight" in columns else []
    if class_weight is not None:
        weights.append(weights_of_classes(columns.get("y"), class_weight))
    return columns | {"sample_weight": product_of_weights(*weights)} if weights else columns


def weights_of_classes(y: Any, class_weight: dict[int, float]) -> np.ndarray:
    """Returns the weight of each row's class; a class that is not named weighs 1, as in Keras.

    Args:
        y: (num_examples,) or (num_examples, 1) class numbers, or one-hot rows.
        class_weight: Dict of class number to weight.

    Returns:
        (num_examples,) float32.

    Raises:
        TypeError: `class_weight` is not a dict of numbers, or `y` is not a single array.
        ValueError: A weight is negative or not finite, or `y` holds no class numbers.
    """
    if not isinstance(class_weight, dict):
        raise TypeError(
            "Expected `class_weight` to be a dict of class number to weight. Received: "
            f"class_weight={class_weight!r}."
        )
    for label, weight in class_weight.items():
        checked_int("key of class_weight", label, 0)
        checked_float(f"class_weight[{label}]", weight, minimum=0.0, below=_FLOAT32_LIMIT)
    if not isinstance(y, np.ndarray):
        raise TypeError(
            "Expected `y` to be that of a single output, because `class_weight` is given. "
            f"Received: y of type {type(y).__name__}. Use `sample_weight` for several outputs."
        )
    labels = _class_numbers(y)
    classes, row_class = np.unique(labels, return_inverse=True)
    weights = [class_weight.get(int(label), 1.0) for label in classes]
    return np.asarray(weights, np.float32)[row_class.reshape(-1)]


def _class_numbers(y: np.ndarray) -> np.ndarray:
    """Returns the (num_examples,) class numbers of integer or one-hot rows."""
    if y.ndim == 2 and y.shape[1] == 1:
        y = y[:, 0]
    if y.dtype.kind in "biuf":
        if y.ndim == 1 and np.array_equal(y, np.round(y)):
            return y
        if y.ndim == 2 and np.all((y == 0) | (y == 1)) and np.all(y.sum(axis=1) == 1):
            return np.argmax(y, axis=1)
    raise ValueError(
        "Expected `y` to hold class numbers, one for each row, or one-hot rows, because "
        "`class_weight` is given. Received: "
        f"y.shape={y.shape}, y.dtype={y.dtype}. Use `sample_weight` instead."
    )


def product_of_weights(sample_weight: Any, class_factors: np.ndarray | None = None) -> Any:
    """Returns checked weights, times the weights of the classes if there are any.

    Args:
        sample_weight: Structure of arrays of `num_examples` rows.
        class_factors: (num_examples,) float32; only with a single array of sample weights.

    Returns:
        The same structure as `sample_weight`, in float32.

    Raises:
        TypeError: Weights are not numbers, or there are several arrays and `class_factors`.
        ValueError: A weight is negative or not finite, or a product is too large for float32.
    """

    def checked(weight: np.ndarray, name: str) -> np.ndarray:
        if weight.dtype.kind not in "biuf":
            raise TypeError(
                f"Expected `{name}` to hold numbers. Received: {name}.dtype={weight.dtype}."
            )
        weight = weight.astype(np.float32, copy=False)
        if not (np.isfinite(weight).all() and (weight >= 0).all()):
            raise ValueError(
                f"Expected `{name}` to be finite and not negative. Received: values from "
                f"{weight.min()} to {weight.max()}."
            )
        if class_factors is None:
            return weight
        with np.errstate(over="ignore"):  # refused below
            product = weight * class_factors.reshape((-1,) + (1,) * (weight.ndim - 1))
        if not np.isfinite(product).all():
            raise ValueError(
                f"Expected `{name}` times `class_weight` to be finite in float32. Received: "
                f"weights up to {weight.max()}, and class weights up to {class_factors.max()}. "
                "Scale the weights down."
            )
        return product

    if class_factors is not None and not isinstance(sample_weight, np.ndarray):
        raise TypeError(
            "Expected `sample_weight` to be that of a single output, because `class_weight` is "
            f"given. Received: sample_weight of type {type(sample_weight).__name__}. Multiply the "
            "weights of the classes into `sample_weight`."
        )
    return map_leaves(checked, sample_weight, "sample_weight")
