"""Random views of examples, made after sampling with random numbers of their own."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from keras_bandmf._checks import PrivacyError, checked_int
from keras_bandmf._keras_internals import is_stateful
from keras_bandmf.clipping.seeds import drawing, with_room_for_draws
from keras_bandmf.clipping.shapes import merge_rows
from keras_bandmf.sampling.sources import map_leaves

# Operations that TensorFlow calls stateful, for what may be in them: what is in them is looked at.
_HARMLESS = {"Assert", "If", "PartitionedCall", "StatefulPartitionedCall", "While"}


class Augmentation:
    """Makes `copies` random views of each row of a batch, row by row.

    Formal guarantees: the function is given one row at a time and the random numbers of that row,
    and is traced once. Its graph holds no operation that may be stateful (`is_stateful`): it reads
    no variable, table, file or data set, keeps nothing for the next row, runs no Python, and draws
    no other random numbers. So a view depends on its own row, its seed, and on constants. Seeds are
    independent of the data, so all other rows have views of one joint law whether or not a row is
    there. It assumes that the constants, which the function closes over, were not computed from the
    training data.

    Args:
        function: Called as `function(x, seed=seed)` on the tensors of one row, without the axis of
            rows, or as `function(x, y=y, seed=seed)` if it has a parameter `y`; it then returns
            `(x, y)`. `seed` has shape (2,), int64, as `tf.image.stateless_random_*` take it. Or a
            Keras layer or model, which is called on `x` with `training=True`.
        copies: K, the number of views of each row.
        spec: Specs of the columns, by `Store.spec()`.

    Raises:
        TypeError: `function` cannot be called.
        ValueError: It changes the shape or type of targets, or gives views without one known shape.
        PrivacyError: It draws random numbers that do not come from `seed`, calls Python code while
            it runs, or reads or keeps something besides its row.

    Example:
        >>> import tensorflow as tf
        >>> from keras_bandmf.sampling.augmentation import Augmentation
        >>> spec = {"x": tf.TensorSpec((None, 4), tf.float32)}
        >>> augment = Augmentation(lambda x, seed: x + tf.cast(seed[0], x.dtype), 2, spec)
        >>> seeds = tf.constant([[[1, 0], [2, 0]]], tf.int64)
        >>> augment({"x": tf.zeros((1, 4)), "seeds": seeds})["x"].numpy()[:, 0]
        array([1., 2.], dtype=float32)
    """

    def __init__(self, function: Any, copies: int, spec: dict[str, Any]):
        self._copies = checked_int("augment_copies", copies, hint="It counts views of an example.")
        if not callable(function):
            raise TypeError(
                "Expected `augment` to be a function of a row and a seed, or a Keras layer. "
                f"Received: augment={function!r}."
            )
        self._layer = function if isinstance(function, keras.layers.Layer) else None
        self._with_y = self._layer is None and "y" in _parameters(function)
        if self._with_y and "y" not in spec:
            raise ValueError(
                "Expected targets, because `augment` has a parameter `y`. Received: y=None."
            )
        self._function = function
        self._spec = spec
        self._trace()

    def _trace(self) -> None:
        signature = {name: map_leaves(_row_spec, self._spec[name], name) for name in self._inputs}
        seed = tf.TensorSpec((2,), tf.int64)
        self._view = tf.function(self._view_of).get_concrete_function(signature, seed)
        _check_graph(self._view.graph)
        self._view_spec = self._checked_view_spec()

    def __getstate__(self) -> dict[str, Any]:
        """Leaves the traced function out, which cannot be pickled."""
        return {name: value for name, value in self.__dict__.items() if name != "_view"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Traces and checks the function again."""
        self.__dict__.update(state)
        self._trace()

    @property
    def copies(self) -> int:
        """The number of views of each row."""
        return self._copies

    @property
    def _inputs(self) -> tuple[str, ...]:
        """The columns that the function is given and returns."""
        return ("x", "y") if self._with_y else ("x",)

    def spec(self) -> dict[str, Any]:
        """Returns the specs of the columns after augmentation."""

        def of_rows(leaf: tf.TensorSpec, name: str) -> tf.TensorSpec:
            return tf.TensorSpec((None, *leaf.shape), leaf.dtype)

        views = {name: map_leaves(of_rows, view, name) for name, view in self._view_spec.items()}
        return self._spec | views

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        """Returns the views of a batch: those of row 0 first, and so on.

        Args:
            batch: Dict of tensors: `x`, and `y` and others where there are any; and `seeds`, (rows,
                views, 2) int64, with one seed for each view of a row.

        Returns:
            The same without `seeds`, with as many times the rows as there are views of each.
        """
        given = {name: batch[name] for name in self._inputs}
        rows = tf.data.Dataset.from_tensor_slices((given, batch["seeds"]))
        # Rows side by side, on all threads of the machine; a map over the axis would use one.
        views = rows.map(self._views_of, tf.data.AUTOTUNE, deterministic=True)
        count = tf.shape(batch["seeds"], tf.int64)[0]
        columns = views.batch(count).get_single_element()
        repeated = {name: part for name, part in batch.items() if name not in (*given, "seeds")}
        return tf.nest.map_structure(merge_rows, columns) | tf.nest.map_structure(
            lambda t: tf.repeat(t, batch["seeds"].shape[1], axis=0), repeated
        )

    def of_arrays(self, batch: dict[str, Any]) -> dict[str, Any]:
        """Returns the views of a batch of arrays, as arrays; see `__call__`."""
        tensors = tf.nest.map_structure(tf.convert_to_tensor, batch)
        return tf.nest.map_structure(np.asarray, self(tensors))

    def one_view_of(self, rows: dict[str, Any], stream: int) -> dict[str, Any]:
        """Returns one view of each row, from random numbers that anybody can compute.

        Args:
            rows: Dict of columns, arrays.
            stream: Number of the random numbers.

        Returns:
            Dict of columns, arrays.
        """
        count = len(tf.nest.flatten(rows)[0])
        words = np.random.Philox(stream).random_raw(2 * count)
        return self.of_arrays(rows | {"seeds": words.view(np.int64).reshape(count, 1, 2)})

    def warn_if_frozen(self, rows: dict[str, Any]) -> None:
        """Warns if other seeds make the same views, as a fixed seed of the function's own does.

        Args:
            rows: A few rows: a dict of columns, arrays.
        """
        one, other = (tf.nest.flatten(self.one_view_of(rows, stream)) for stream in (1, 2))
        if all(np.array_equal(a, b, equal_nan=True) for a, b in zip(one, other, strict=True)):
            warnings.warn(
                "`augment` made the same views of the first rows from two sets of seeds. Pass the "
                "`seed` that it is given to the operations that draw: a seed of its own, or random "
                "numbers of NumPy, would make every view of a row alike.",
                stacklevel=4,
            )

    def _views_of(self, given: dict[str, Any], seeds: tf.Tensor) -> dict[str, Any]:
        """Returns the views of one row, stacked."""
        views = [self._view(given, seed) for seed in tf.unstack(seeds)]
        return tf.nest.map_structure(lambda *parts: tf.stack(parts), *views)

    def _view_of(self, given: dict[str, Any], seed: tf.Tensor) -> dict[str, Any]:
        x = given["x"]
        if self._layer is not None:
            return {"x": _by_layer(self._layer, x, seed)}
        if not self._with_y:
            return {"x": self._function(x, seed=seed)}
        result = self._function(x, y=given["y"], seed=seed)
        if not isinstance(result, tuple) or len(result) != 2:
            raise ValueError(
                "Expected `augment` to return (x, y), because it has a parameter `y`. Received: "
                f"{type(result).__name__}."
            )
        return {"x": result[0], "y": result[1]}

    def _checked_view_spec(self) -> dict[str, Any]:
        """Returns the specs of a view, which must be dense, of known shape, and keep targets."""

        def checked(leaf: Any, name: str) -> tf.TensorSpec:
            if not isinstance(leaf, tf.Tensor) or not leaf.shape.is_fully_defined():
                received = leaf.shape if isinstance(leaf, tf.Tensor) else type(leaf).__name__
                raise ValueError(
                    f"Expected `augment` to return dense views of one shape. Received: {name} of "
                    f"{received}. Crop or pad to a fixed size, and end with `tf.ensure_shape`."
                )
            return tf.TensorSpec(leaf.shape, leaf.dtype)

        found = {
            name: map_leaves(checked, column, name)
            for name, column in self._view.structured_outputs.items()
        }
        if self._with_y:
            given = map_leaves(_row_spec, self._spec["y"], "y")
            if found["y"] != given:
                raise ValueError(
                    "Expected `augment` to keep the shape and dtype of the targets. Received: "
                    f"y={found['y']} in place of {given}."
                )
        return found


def _by_layer(layer: keras.layers.Layer, x: Any, seed: tf.Tensor) -> Any:
    """Returns the view of one row that a Keras layer makes with the seed of that view."""
    one = tf.nest.map_structure(lambda t: t[tf.newaxis], x)
    with drawing(layer, with_room_for_draws(tf.bitcast(seed[0], tf.uint64))):
        views = layer(one, training=True)
    return tf.nest.map_structure(lambda t: tf.convert_to_tensor(t)[0], views)


def _row_spec(leaf: tf.TensorSpec, name: str) -> tf.TensorSpec:
    """Returns the spec of one row of a column."""
    return tf.TensorSpec(leaf.shape[1:], leaf.dtype)


def _parameters(function: Callable[..., Any]) -> frozenset[str]:
    try:
        return frozenset(inspect.signature(function).parameters)
    except ValueError:  # some functions that are written in C
        return frozenset()


def _check_graph(graph: tf.Graph) -> None:
    """Refuses operations that keep something between rows, or random numbers of their own.

    Raises:
        PrivacyError: There is such an operation.
    """
    definition = graph.as_graph_def()
    nodes = [*definition.node, *(n for f in definition.library.function for n in f.node_def)]
    for node in nodes:
        if node.op in _HARMLESS or not is_stateful(node.op):
            continue
        raise PrivacyError(
            "Expected `augment` to make a view from its row and its seed alone. Received: an "
            f"operation of type {node.op} ('{node.name}'), which draws other random numbers, "
            "reads or writes a variable, a table or a file, or calls Python. Put layers with "
            "weights into the model, and tables into `preprocess=`. Use "
            "`tf.image.stateless_random_*` and `tf.random.stateless_*` with the `seed` that is "
            "passed, or Keras layers such as `keras.layers.RandomTranslation`."
        )
