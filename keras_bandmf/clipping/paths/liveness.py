"""The memory of a traced graph, from when its tensors come to be and when they are last used."""

from __future__ import annotations

import collections
import dataclasses
import math
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import tensorflow as tf

# Operations whose output is the memory of an input.
_VIEWS = {"Identity", "IdentityN", "Reshape", "Squeeze", "ExpandDims", "StopGradient"}
_VIEWS |= {"PreventGradient"}
_SLICES = {"Slice", "StridedSlice"}
# Operations whose output is there for the whole step, whatever the rows.
_LASTING = {"Const", "ReadVariableOp"}
_OPAQUE = (tf.resource, tf.variant, tf.string)
_LOOPS = {"While", "StatelessWhile"}


class Moment(NamedTuple):
    """The bytes that are alive at one moment of a step.

    Attributes:
        fixed: Of tensors whose size does not depend on the number of rows.
        growing: Of the others, for as many rows as the graph was traced with.
    """

    fixed: int
    growing: int


class Memory(NamedTuple):
    """The memory of a step as a function of the number of rows.

    Attributes:
        rows: The number of rows of the trace.
        moments: Of any two, each has more of one kind of bytes than the other.
    """

    rows: int
    moments: tuple[Moment, ...]

    def peak(self, rows: int) -> int:
        """Returns the most bytes that are alive at any moment of a step on `rows` rows."""
        return max(fixed + growing * rows // self.rows for fixed, growing in self.moments)

    def most_rows(self, budget: int) -> int:
        """Returns the largest number of rows that add at most `budget` bytes to the peak of none.

        At least 1: a single row must be taken, whatever it needs.
        """
        limit = self.peak(0) + budget
        most = [(limit - m.fixed) * self.rows // m.growing for m in self.moments if m.growing]
        return max(1, min(most, default=self.rows))


def memory_of(graph: tf.Graph, rows: int, unit: int) -> Memory:
    """Returns the memory that a step needs, by the liveness of the tensors in its trace.

    A tensor is alive from the operation that makes it to the last that uses it, and what the
    function returns to the end. TensorFlow promises no order of operations. So two are looked at:
    that of the Python code, which is about the order of eager execution, and that in which
    operations become ready, which is about the order of the executor of graphs. The moments of both
    are kept.

    Args:
        graph: The graph of a concrete function that was traced with a known number of rows.
        rows: That number, a multiple of `unit`.
        unit: A prime that no other axis is likely to be a multiple of. Tensors with a number of
            elements that is a multiple of it are taken to grow with the rows.

    Returns:
        The memory: a function of the trace alone, the same on each machine with the same version
        of TensorFlow. Lists that a loop reads or fills are counted. Scratch memory of kernels, what
        else is inside of loops, branches and functions, and tensors of unknown shape are not;
        in-place operations are counted as if they were not.
    """
    operations = _needed(graph)
    moments: set[Moment] = set()
    for order in (operations, _as_ready(operations)):
        moments.update(_moments(order, graph.outputs, unit))
    return Memory(rows, tuple(_largest(moments)))


def _needed(graph: tf.Graph) -> list[tf.Operation]:
    """Returns the operations that what the function returns depends on, in the order of Python."""
    waiting = [*(t.op for t in graph.outputs), *graph.control_outputs]
    found = set(waiting)
    while waiting:
        before = _inputs(waiting.pop()) - found
        found |= before
        waiting += before
    return [operation for operation in graph.get_operations() if operation in found]


def _inputs(operation: tf.Operation) -> set[tf.Operation]:
    return {*(t.op for t in operation.inputs), *operation.control_inputs}


def _as_ready(operations: list[tf.Operation]) -> list[tf.Operation]:
    """Returns operations in the order in which their inputs are complete: first in, first out."""
    users: dict[tf.Operation, list[tf.Operation]] = {o: [] for o in operations}
    missing = {}
    for operation in operations:
        inputs = _inputs(operation)
        missing[operation] = len(inputs)
        for one in inputs:
            users[one].append(operation)
    order = [o for o in operations if not missing[o]]
    for operation in order:  # grows meanwhile
        for user in users[operation]:
            missing[user] -= 1
            if not missing[user]:
                order.append(user)
    return order


@dataclasses.dataclass
class _Buffer:
    """Memory of one tensor and its views.

    Attributes:
        fixed: Bytes, if they do not depend on the rows.
        growing: Bytes otherwise.
        uses: How often they will still be read.
    """

    fixed: int
    growing: int
    uses: int = 0


def _moments(
    order: Iterable[tf.Operation], outputs: list[tf.Tensor], unit: int
) -> Iterator[Moment]:
    """Yields what is alive while each operation runs."""
    order = list(order)
    read = [*outputs, *(t for operation in order for t in operation.inputs)]
    uses = collections.Counter(t.ref() for t in read)
    buffers: dict[Any, _Buffer] = {}
    fixed = growing = 0
    for operation in order:
        touched = [buffers[t.ref()] for t in operation.inputs]
        for position, tensor in enumerate(operation.outputs):
            source = _source(operation, position)
            if source is None:
                buffer = _Buffer(*_sizes(tensor, unit))
                fixed, growing = fixed + buffer.fixed, growing + buffer.growing
            else:
                buffer = buffers[source.ref()]
            buffer.uses += uses[tensor.ref()]
            buffers[tensor.ref()] = buffer
        yield Moment(fixed, growing)
        for buffer in touched:
            buffer.uses -= 1
        made = [buffers[t.ref()] for t in operation.outputs]
        for buffer in {id(b): b for b in (*touched, *made)}.values():
            if not buffer.uses:
                fixed, growing = fixed - buffer.fixed, growing - buffer.growing


def _source(operation: tf.Operation, position: int) -> tf.Tensor | None:
    """Returns the input whose memory an output is, or None if it has its own."""
    if operation.type in _VIEWS:
        return operation.inputs[position]
    if operation.type in _LOOPS and operation.outputs[position].dtype == tf.variant:
        given = operation.inputs[position]
        return None if _is_empty_list(given) else given
    if operation.type in _SLICES:
        whole, part = operation.inputs[0], operation.outputs[0]
        same = whole.shape.num_elements() == part.shape.num_elements()
        # Some entries of axis 0 are next to each other.
        if same or (part.shape.rank == whole.shape.rank and part.shape[1:] == whole.shape[1:]):
            return whole
    return None


def _sizes(tensor: tf.Tensor, unit: int) -> tuple[int, int]:
    """Returns the bytes of a tensor: those that are fixed, and those that grow with the rows."""
    dtype, count = _elements(tensor)
    if not count or dtype in _OPAQUE or tensor.op.type in _LASTING:
        return 0, 0
    size = count * dtype.size
    return (size, 0) if count % unit else (0, size)


def _elements(tensor: tf.Tensor) -> tuple[tf.DType, int | None]:
    """Returns the dtype and the number of the elements of a tensor, or of the list that it is."""
    operation = tensor.op
    if operation.type == "TensorListFromTensor":
        return _elements(operation.inputs[0])
    if operation.type in _LOOPS:
        given = operation.inputs[tensor.value_index]
        if _is_empty_list(given):
            shape, length = map(tf.get_static_value, given.op.inputs)
            known = shape is not None and length is not None and (shape >= 0).all()
            count = int(length) * math.prod(shape.tolist()) if known else None
            return given.op.get_attr("element_dtype"), count
    return tensor.dtype.base_dtype, tensor.shape.num_elements()


def _is_empty_list(tensor: tf.Tensor) -> bool:
    """Returns whether this is a list that has places and no memory yet: a loop fills it."""
    return tensor.op.type == "TensorListReserve"


def _largest(moments: Iterable[Moment]) -> Iterator[Moment]:
    """Yields the moments that no other one has more bytes of both kinds than."""
    most = -1
    for moment in sorted(moments, reverse=True):
        if moment.growing > most:
            most = moment.growing
            yield moment
