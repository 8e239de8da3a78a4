"""The operations of functional models (`keras.ops`) that treat rows independently."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import keras
import numpy as np

from keras_bandmf._keras_internals import operation_classes
from keras_bandmf.clipping.rowwise.known_layers import axis_reason, einsum_reason, replaced_reason

Condition = Callable[[Any], str | None]


def operation_reason(node: Any) -> str | None:
    """Returns why one call of an operation of a functional model may mix rows, or None.

    Formal guarantees: of None, that every output has a row per row of the inputs, on axis 0, and
    that it depends on that row alone, provided the same holds of every symbolic input, and that
    each tensor has the number of axes that Keras declared, and the rows on axis 0 alone: that is
    looked at when the model runs (`declared_shapes`). Constants may take part as arguments where
    they cannot be aligned with the rows, and never as settings.

    Args:
        node: Keras's record of the call.
    """
    condition = _TABLE.get(type(node.operation))
    if condition is None:
        return "it is not among the operations known to treat rows independently"
    why = replaced_reason(node.operation)
    if why is not None:
        return why
    for setting in keras.tree.flatten([v for v in vars(node.operation).values() if _plain(v)]):
        if hasattr(setting, "shape") and np.ndim(setting):
            return "one of its settings is an array, which may have an axis where the rows are"
    inputs = node.input_tensors
    if any(t.shape is None or not len(t.shape) for t in [*inputs, *node.outputs]):
        return "a tensor without axes takes part"
    if any(t.shape[0] != inputs[0].shape[0] for t in [*inputs, *node.outputs]):
        return "axis 0 is not the rows in all of its tensors"
    return condition(node)


def _plain(value: Any) -> bool:
    return isinstance(value, (tuple, list)) or hasattr(value, "shape")


def _arguments(node: Any) -> list[Any]:
    return [*node.arguments.args, *node.arguments.kwargs.values()]


def _elementwise(node: Any) -> str | None:
    """Returns why an operand, aligned on the right, may meet rows at another axis, or None."""
    rank = len(node.outputs[0].shape)
    for operand in keras.tree.flatten(_arguments(node)):
        if isinstance(operand, keras.KerasTensor):
            if len(operand.shape) != rank:
                return "its operands have different numbers of axes"
        elif hasattr(operand, "shape") or isinstance(operand, np.ndarray):
            shape = tuple(operand.shape)
            if len(shape) > rank or (len(shape) == rank and shape[0] != 1):
                return "a constant has an axis where the rows are"
    return None


def _one(node: Any) -> str | None:
    tensors = [t for t in keras.tree.flatten(_arguments(node)) if hasattr(t, "shape")]
    return None if len(tensors) == 1 else "it takes more than one tensor"


def _along(attribute: str = "axis") -> Condition:
    def condition(node: Any) -> str | None:
        rank = len(node.input_tensors[0].shape)
        axes = getattr(node.operation, attribute, None)
        return _one(node) or axis_reason(axes, rank, attribute)

    return condition


def _expand_dims(node: Any) -> str | None:
    return _one(node) or axis_reason(node.operation.axis, len(node.outputs[0].shape))


def _joined(node: Any) -> str | None:
    tensors = keras.tree.flatten(_arguments(node))
    if not all(isinstance(t, keras.KerasTensor) for t in tensors):
        return "a constant takes part"
    return _elementwise_ranks(tensors) or axis_reason(
        node.operation.axis, len(node.outputs[0].shape)
    )


def _elementwise_ranks(tensors: list[Any]) -> str | None:
    same = len({len(t.shape) for t in tensors}) == 1
    return None if same else "its operands have different numbers of axes"


def _along_with(node: Any) -> str | None:
    tensors = keras.tree.flatten(_arguments(node))
    if not all(isinstance(t, keras.KerasTensor) for t in tensors):
        return "a constant takes part"
    rank = len(node.input_tensors[0].shape)
    return _elementwise_ranks(tensors) or axis_reason(node.operation.axis, rank)


def _take(node: Any) -> str | None:
    if len(node.input_tensors) != 1 or not isinstance(node.arguments.args[0], keras.KerasTensor):
        return "it looks up rows by number"
    return axis_reason(node.operation.axis, len(node.input_tensors[0].shape))


def _reshape(node: Any) -> str | None:
    old, new = node.input_tensors[0].shape[1:], tuple(node.operation.newshape)
    sizes = (*old, *new[1:])
    known = all(isinstance(size, int) and size > 0 for size in sizes)
    if not known or not new or new[0] != -1 or math.prod(old) != math.prod(new[1:]):
        return f"its new shape {new} may cut rows apart: it must be (-1, ...) with all sizes known"
    return _one(node)


def _transpose(node: Any) -> str | None:
    axes = node.operation.axes
    kept = axes is not None and list(axes)[0] == 0
    return _one(node) if kept else "it moves axis 0"


def _swapaxes(node: Any) -> str | None:
    axes = (node.operation.axis1, node.operation.axis2)
    return _one(node) or axis_reason(axes, len(node.input_tensors[0].shape))


def _moveaxis(node: Any) -> str | None:
    axes = (node.operation.source, node.operation.destination)
    return _one(node) or axis_reason(axes, len(node.input_tensors[0].shape))


def _matmul(node: Any) -> str | None:
    operands = _arguments(node)
    ranks = [len(t.shape) for t in operands if isinstance(t, keras.KerasTensor)]
    if len(ranks) == 2:
        fits = ranks[0] == ranks[1] >= 3
    else:
        # A constant matrix: on the right of rows of vectors, or on either side of stacks.
        fits = all(isinstance(t, keras.KerasTensor) or len(t.shape) == 2 for t in operands)
        right = isinstance(operands[0], keras.KerasTensor)
        fits = fits and ranks[0] >= (2 if right else 3)
    return None if fits else "its operands do not keep the rows on axis 0"


def _einsum(node: Any) -> str | None:
    operands = keras.tree.flatten(_arguments(node))
    rows = [isinstance(t, keras.KerasTensor) for t in operands if not isinstance(t, str)]
    if not rows or rows != sorted(rows, reverse=True):
        return "a constant comes before a tensor with rows"
    ranks = [len(t.shape) for t in operands if isinstance(t, keras.KerasTensor)]
    return einsum_reason(node.operation.subscripts, ranks)


def _getitem(node: Any) -> str | None:
    arguments = _arguments(node)
    key = arguments[1] if isinstance(arguments[1], (tuple, list)) else (arguments[1],)
    kinds = (int, slice, type(None), type(Ellipsis))
    if not key or not all(isinstance(part, kinds) for part in key):
        return "it looks up rows by number"
    rank = len(node.input_tensors[0].shape)
    if key[0] is Ellipsis:
        kept = sum(part is not None for part in key) - 1 < rank
    else:
        kept = key[0] == slice(None)
    return None if kept else "it takes single rows"


def _repeat(node: Any) -> str | None:
    if not isinstance(node.operation.repeats, int):
        return "its repeats are a tensor"
    return _along()(node)


def _pad(node: Any) -> str | None:
    width = node.operation.pad_width
    kept = isinstance(width, (tuple, list)) and len(width) == len(node.input_tensors[0].shape)
    kept = kept and isinstance(width[0], (tuple, list)) and tuple(width[0]) == (0, 0)
    return _one(node) if kept else "it pads axis 0"


def _rank_of(least: int) -> Condition:
    def condition(node: Any) -> str | None:
        ranks = [len(t.shape) for t in node.input_tensors]
        return _one(node) if min(ranks) >= least else f"its input has {min(ranks)} axes"

    return condition


_UNARY = (
    "Absolute Arccos Arccosh Arcsin Arcsinh Arctan Arctanh Ceil Clip Copy Cos Cosh Exp Exp2 Expm1 "
    "Floor Isfinite Isinf Isnan Log Log10 Log1p Log2 LogicalNot NanToNum Negative OnesLike "
    "Reciprocal Round Sign Sin Sinh Sqrt Square Tan Tanh Trunc ZerosLike Cast StopGradient Relu "
    "Relu6 Sigmoid Softplus Softsign SoftShrink Silu Squareplus LogSigmoid LeakyRelu HardSigmoid "
    "HardSilu Elu Selu Gelu Celu TanhShrink HardTanh HardShrink Threshold Rsqrt Erf Erfc"
)
_BROADCAST = (
    "Add Subtract Multiply Divide TrueDivide FloorDivide DivideNoNan Power Mod Maximum Minimum "
    "Where Equal NotEqual Greater GreaterEqual Less LessEqual LogicalAnd LogicalOr LogicalXor "
    "Arctan2 Logaddexp Hypot"
)
_REDUCTIONS = (
    "Mean Sum Max Min Amax Amin Any All Prod Std Var Argmax Argmin Argsort Sort Cumsum Cumprod "
    "CountNonzero Median Softmax LogSoftmax Sparsemax Logsumexp Flip Roll Squeeze Normalize Norm "
    "Glu OneHot"
)
_BY_NAME: dict[Condition, str] = {
    _elementwise: _UNARY + " " + _BROADCAST,
    _along(): _REDUCTIONS,
    _expand_dims: "ExpandDims",
    _joined: "Concatenate Stack",
    _along_with: "TakeAlongAxis",
    _take: "Take",
    _reshape: "Reshape",
    _transpose: "Transpose",
    _swapaxes: "Swapaxes",
    _moveaxis: "Moveaxis",
    _matmul: "Matmul",
    _einsum: "Einsum",
    _getitem: "GetItem",
    _repeat: "Repeat",
    _pad: "Pad",
    _rank_of(3): "MaxPool AveragePool",
}
_TABLE: dict[type, Condition] = {
    operation_class: condition
    for condition, names in _BY_NAME.items()
    for name in names.split()
    for operation_class in operation_classes(name)
}
