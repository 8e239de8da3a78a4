"""Finds what a private pass reads, writes and draws, in the graph that TensorFlow traces of it.

By structure, not by values: what an operation does under a condition that the data at hand do not
meet is found as well.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import keras
import tensorflow as tf

from keras_bandmf._checks import PrivacyError
from keras_bandmf._keras_internals import (
    all_layers,
    operation_definition,
    own_metrics,
    watched_variables,
    wrongly_stateless,
)
from keras_bandmf.clipping.checks.tiles import why_refused

_KEY = "the mask key"
_READS = {
    "LookupTableFindV2",
    "LookupTableSizeV2",
    "ReadVariableOp",
    "ResourceGather",
    "ResourceGatherNd",
    "VarIsInitializedOp",
    "VariableShape",
}
# No later step can read what these write.
_WRITES_OUTSIDE = {
    "Assert",
    "Print",
    "PrintV2",
    "Timestamp",
    "WriteHistogramSummary",
    "WriteImageSummary",
    "WriteScalarSummary",
    "WriteSummary",
}
_FORWARDS = {"Identity", "IdentityN"}
_CALLS = {"PartitionedCall", "StatefulPartitionedCall"}
_FROM_SEEDS = "Stateless"
_SEED_HELPERS = {"StatelessRandomGetAlg", "StatelessRandomGetKeyCounter"}
_SEED_ARGUMENTS = {"seed", "key", "counter"}

Labels = frozenset


class Refused(ValueError):
    """A pass does what no private pass may do: the message says what, where and what instead."""

    # AutoGraph keeps the type of an exception that is made like this, and hides that of others.
    __init__ = Exception.__init__


class _Node(NamedTuple):
    """An operation of a graph or of a function body."""

    name: str
    kind: str
    inputs: list[Labels]
    definition: Any  # its OpDef
    node_def: Callable[[], Any]  # slow for operations of a graph
    forwards: bool  # whether an output is a resource


class Watch:
    """Looks at the operations added to the current graph from here on; in eager mode at none.

    Args:
        model: The model whose pass is traced.
        first: The seed tensor of `MaskSeeds.of_pass`; None if Keras's generators are used.
        generators: The seed generators that may be written in that case.
        unread: What no result may depend on, besides metrics; from `written_in`.
    """

    def __init__(
        self,
        model: keras.Model,
        first: tf.Tensor | None,
        generators: Iterable[keras.random.SeedGenerator] = (),
        unread: dict[int, str] | None = None,
    ):
        self._graph = None if tf.executing_eagerly() else tf.compat.v1.get_default_graph()
        if self._graph is None:
            return
        self._start = len(self._graph.get_operations())
        self._first = first
        metrics = [*model.metrics_variables, *_metric_variables(model)]
        self._metrics = set(_handles(metrics))
        self._seeds = set(_handles([] if first is not None else [g.state for g in generators]))
        self._unread = self._metrics | set(unread or {})
        self._names = {**(unread or {}), **_handles([*model.variables, *metrics])}

    def refuse(self, results: Any) -> None:
        """Refuses the pass if what it computed carries more than weights, constants and seeds.

        Args:
            results: A structure of tensors: what the pass returns.

        Raises:
            Refused: If it writes a variable that is no metric, a result depends on a metric, it
                draws random numbers from other seeds than those of the run, it runs an operation
                that keeps a state which cannot be looked at, or it has a product in 16 bits that
                may mix rows (`tiles`).

        Formal guarantees: if it returns in a graph, `results` are functions of the weights, the
            data, constants, the seeds and of variables that the pass does not write and that
            belong to no metric of the model. Out of sight: Python code that runs at each step of an
            eager run, and variables that something else (a callback) changes. Of variables that a
            metric function changes without owning them, those are known that `written_in` found.
        """
        if self._graph is None:
            return
        walk = _Walk(self._graph, self._first, self._unread)
        walk.operations(self._graph.get_operations()[self._start :])
        for handle in walk.written:
            if handle not in self._metrics and handle not in self._seeds:
                raise Refused(
                    "A training forward pass or loss may write no variable but metrics: what it "
                    "writes would carry data past the noise. Remove the update (running "
                    "statistics: use GroupNormalization or LayerNormalization; a recurrent state: "
                    "`stateful=False`; a seed generator: make it an attribute of its layer). "
                    f"Received: writes to {self._name(handle, walk)}"
                )
        for tensor in keras.tree.flatten(results):
            if isinstance(tensor, tf.Tensor):
                for handle in walk.labels(tensor) & self._unread:
                    raise Refused(
                        "A metric holds data of earlier steps without noise: no output of the "
                        "model and no loss may depend on one. Write it, but do not read it in "
                        "`call` or in a loss. "
                        f"Received: a dependence on {self._name(handle, walk)}"
                    )

    def _name(self, handle: int, walk: _Walk) -> str:
        return self._names.get(handle) or walk.names.get(handle, "a variable or table")


def written_in(graph: tf.Graph) -> dict[int, str]:
    """Returns what a traced function may write: identities of resources, with names for messages.

    Formal guarantees: every variable and table that an operation of the graph, or of a function
    it calls, gets otherwise than to read it. What Python code writes (`tf.py_function`) is not
    among them.
    """
    walk = _Writes(graph, None, set())
    walk.operations(graph.get_operations())
    return {handle: walk.names.get(handle, "a variable or table") for handle in walk.written}


def refuse_products(graph: tf.Graph) -> None:
    """Refuses a traced function if it has a product in 16 bits that may mix rows (`tiles`).

    Raises:
        PrivacyError: If it has one, also in a function that it calls.
    """
    try:
        _Products(graph, None, set()).operations(graph.get_operations())
    except Refused as error:
        raise PrivacyError(str(error)) from error


def _metric_variables(model: keras.Model) -> list[Any]:
    """Returns variables of metrics that Keras does not list, such as those of TensorFlow."""
    found = []
    for layer in all_layers(model):
        for metric in own_metrics(layer):
            found += [*metric.variables, *_raw(metric)]
    for metric in model.metrics:
        found += [*metric.variables, *_raw(metric)]
    return found


def _raw(metric: keras.metrics.Metric) -> list[tf.Variable]:
    return [value for value in vars(metric).values() if isinstance(value, tf.Variable)]


def _handles(variables: Iterable[Any]) -> dict[int, str]:
    """Returns the identity of each variable's resource, on each replica -> its name."""
    found = {}
    strategy = tf.distribute.get_strategy()
    for variable in variables:
        raw = variable.value if isinstance(variable, keras.Variable) else variable
        name = getattr(variable, "path", None) or variable.name
        for local in strategy.experimental_local_results(raw):
            found[id(local.handle)] = name
    return found


class _Walk:
    """Follows resources, metrics and the key through operations, into function bodies too."""

    _products = True  # whether it refuses those that may mix rows

    def __init__(
        self,
        graph: tf.Graph,
        first: tf.Tensor | None,
        followed: set[int],
    ):
        self.written: set[int] = set()
        self.names: dict[int, str] = {}
        self._graph = graph
        self._first = first
        self._followed = followed | {_KEY}
        self._labels = {} if first is None else {first.op.name: Labels([_KEY])}
        self._functions: dict[str, Any] | None = None
        self._seen: dict[tuple, Labels] = {}
        self._captured: dict[int, dict[int, tf.Tensor]] = {}
        self._draws: dict[str, tuple] = {}

    def operations(self, operations: list[tf.Operation]) -> None:
        """Looks at operations in the order in which they were made."""
        for operation in operations:
            if operation.type in ("Placeholder", "Const"):
                continue
            inputs = list(operation.inputs)
            node = _Node(
                operation.name,
                operation.type,
                [self.labels(tensor) for tensor in inputs],
                operation_definition(operation.type),
                functools.partial(getattr, operation, "node_def"),
                any(output.dtype == tf.resource for output in operation.outputs),
            )
            if self._first is not None:
                self._refuse_shared_seeds(operation)
            self._labels[operation.name] = self._visit(node)

    def labels(self, tensor: tf.Tensor) -> Labels:
        """Returns what a tensor of the graph depends on."""
        known = self._labels.get(tensor.op.name) if tensor.graph is self._graph else None
        if known is not None:
            return known
        if tensor.dtype != tf.resource:
            return Labels()
        origin = self._origin(tensor)
        handle = id(origin)
        if handle not in self.names:
            self.names[handle] = self._resource_name(origin)
        return Labels([handle])

    def _origin(self, tensor: tf.Tensor) -> Any:
        """Returns the tensor that was captured, through all functions around this one."""
        while hasattr(tensor, "graph"):
            graph = tensor.graph
            if id(graph) not in self._captured:
                pairs = getattr(graph, "captures", [])
                self._captured[id(graph)] = {id(inner): outer for outer, inner in pairs}
            outer = self._captured[id(graph)].get(id(tensor))
            if outer is None:
                return tensor
            tensor = outer
        return tensor

    def _resource_name(self, origin: Any) -> str:
        graph = self._graph
        while graph is not None:
            # They are listed as `variables` only once the trace is complete. For the message only.
            for variable in watched_variables(graph):
                if variable.handle is origin:
                    return variable.name
            graph = getattr(graph, "outer_graph", None)
        return "a variable or table that no layer owns"

    def _visit(self, node: _Node) -> Labels:
        """Checks one operation and returns what its outputs depend on."""
        union = Labels().union(*node.inputs)
        kept = union if node.forwards or node.kind in _FORWARDS else union & self._followed
        if node.definition is None and self._function(node.kind) is not None:
            # Its type is the name of a function, as in imported graphs.
            self._body(node.kind, node.inputs)
            return kept
        bodies = _bodies(node)
        self._check_product(node)
        if wrongly_stateless(node.kind):
            self._check_stateful(node)
        if bodies:
            results = [self._body(body, node.inputs) for body in bodies]
            if node.kind in _CALLS and not node.forwards:
                # It runs once, from its arguments to its results, so only these are passed on.
                kept = Labels().union(*results) & self._followed
        elif node.kind.startswith(_FROM_SEEDS):
            self._check_seed(node)
        elif node.definition is None or node.definition.is_stateful:
            self._check_stateful(node)
        return kept

    def _check_product(self, node: _Node) -> None:
        why = why_refused(node.name, node.kind, node.node_def) if self._products else None
        if why:
            raise Refused(why)

    def _check_seed(self, node: _Node) -> None:
        names = [argument.name for argument in node.definition.input_arg]
        if self._first is None or node.kind in _SEED_HELPERS or not _SEED_ARGUMENTS & set(names):
            return
        seeds = [x for x, name in zip(node.inputs, names, strict=True) if name in _SEED_ARGUMENTS]
        if not any(_KEY in labels for labels in seeds):
            raise Refused(
                "Random numbers must come from the secret key of the run. A fixed or public seed "
                "gives each place in the batch the same numbers, so that one row more moves all "
                "others to new ones. Pass `seed=self.seed_generator`, a "
                "`keras.random.SeedGenerator` that is an attribute of the layer; for numbers that "
                f"never change use a weight. Received: operation '{node.name}' of type {node.kind}"
            )

    def _refuse_shared_seeds(self, operation: tf.Operation) -> None:
        """Refuses one seed for draws of different shapes: rows would share bits by their places."""
        if not operation.type.startswith(_FROM_SEEDS) or operation.type in _SEED_HELPERS:
            return
        names = [argument.name for argument in operation.op_def.input_arg]
        at = next((i for i, name in enumerate(names) if name in ("key", "seed")), None)
        if at is None or at >= len(operation.inputs):
            return
        source = operation.inputs[at]
        if source.op.type == "StatelessRandomGetKeyCounter":
            source = source.op.inputs[0]
        output = operation.outputs[0]
        drawn = (operation.type, output.dtype, str(output.shape))
        if self._draws.setdefault(source.name, drawn) != drawn:
            raise Refused(
                "One seed serves for random numbers of different kinds or shapes: which rows share "
                "them depends on the number of rows. Call the seed generator for each draw. "
                f"Received: operation '{operation.name}' of type {operation.type}"
            )

    def _check_stateful(self, node: _Node) -> None:
        kind = node.kind
        if kind in _READS or kind in _WRITES_OUTSIDE:
            return
        if kind == "Empty" and node.node_def().attr["init"].b:  # zeros, despite its name
            return
        if kind.startswith("CudnnRNN") and not node.node_def().attr["dropout"].f:
            return
        if _is_random(kind):
            if self._first is None:
                return
            raise Refused(
                "Random numbers of TensorFlow's own state do not come from the secret key of the "
                "run. Draw them with `keras.random`, with `seed=` a `keras.random.SeedGenerator` "
                "that is an attribute of the layer. "
                f"Received: operation '{node.name}' of type {kind}"
            )
        resources = node.inputs[0] - {_KEY} if node.inputs else Labels()
        if _assigns(kind) and resources:
            self.written |= resources
            return
        raise Refused(
            "A private pass may use no operation that could carry data from one step to another "
            "out of sight: Python code (`tf.py_function`, `tf.numpy_function`), queues, mutable "
            "tables, files. Write it in TensorFlow operations without state. "
            f"Received: operation '{node.name}' of type {kind}"
        )

    def _body(self, name: str, inputs: list[Labels]) -> Labels:
        """Returns what the results of a function depend on, given that of its arguments."""
        function = self._function(name)
        if function is None:
            raise Refused(
                "A private pass may call only functions that can be looked into. "
                f"Received: a call of '{name}'"
            )
        arguments = function.signature.input_arg
        if len(inputs) != len(arguments):
            # A branch does not get the condition. For other kinds each argument may be any input.
            union = Labels().union(*inputs)
            fits = len(inputs) == len(arguments) + 1
            inputs = inputs[1:] if fits else [union] * len(arguments)
        if (name, *inputs) in self._seen:
            return self._seen[(name, *inputs)]
        labels = {a.name: given for a, given in zip(arguments, inputs, strict=True)}
        nodes = {node.name: node for node in function.node_def}

        def of(reference: str) -> Labels:
            source = reference.split(":")[0]
            if source not in labels:
                visit(nodes[source])
            return labels[source]

        def visit(node_def: Any) -> None:
            given = [of(i) for i in node_def.input if not i.startswith("^")]
            definition = operation_definition(node_def.op)
            node = _Node(node_def.name, node_def.op, given, definition, lambda: node_def, False)
            labels[node_def.name] = self._visit(node)

        # Sources first, so that recursion does not grow with the function.
        for node_def in function.node_def:
            if node_def.name not in labels:
                visit(node_def)
        results = Labels().union(*(of(reference) for reference in function.ret.values()))
        self._seen[(name, *inputs)] = results
        return results

    def _function(self, name: str) -> Any:
        if self._functions is None:
            library = self._graph.as_graph_def().library.function
            self._functions = {function.signature.name: function for function in library}
        return self._functions.get(name)


class _Writes(_Walk):
    """Collects what is written and refuses nothing."""

    _products = False

    def _check_stateful(self, node: _Node) -> None:
        if node.kind not in _READS:
            self.written |= Labels().union(*node.inputs) - {_KEY}

    def _body(self, name: str, inputs: list[Labels]) -> Labels:
        if self._function(name) is None:
            self.written |= Labels().union(*inputs)
            return Labels().union(*inputs)
        return super()._body(name, inputs)


class _Products(_Writes):
    """Refuses products alone."""

    _products = True


def _bodies(node: _Node) -> list[str]:
    """Returns names of the functions that an operation runs."""
    kinds = {"func", "list(func)"}
    names = [a.name for a in node.definition.attr if a.type in kinds] if node.definition else []
    found = []
    for value in [node.node_def().attr[name] for name in names]:
        found += [f.name for f in [value.func, *value.list.func] if f.name]
    return found


def _is_random(kind: str) -> bool:
    words = ("Random", "Multinomial", "TruncatedNormal", "CandidateSampler", "Rng")
    return any(word in kind for word in words) or kind.startswith("Stateful") and "Call" not in kind


def _assigns(kind: str) -> bool:
    return kind.startswith(("Assign", "ResourceScatter", "ResourceApply", "LookupTable"))
