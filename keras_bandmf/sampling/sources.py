"""From the data that a user passes to arrays of exactly `num_examples` rows."""

from __future__ import annotations

import itertools
import numbers
from collections.abc import Callable, Iterable
from typing import Any

import keras
import numpy as np
import tensorflow as tf

_CHUNK_ROWS = 1024


def map_leaves(
    function: Callable[[Any, str], Any],
    structure: Any,
    name: str,
    lists_are_leaves: bool = False,
) -> Any:
    """Applies `function(leaf, name of the leaf)` in dicts, tuples and lists; lists become tuples.

    `tf.data` takes a list for a tensor, hence the tuples.

    Args:
        function: Function of a leaf and its name.
        structure: Nested dicts, tuples and lists, or a leaf.
        name: The name of the whole structure, from which those of the leaves are made.
        lists_are_leaves: Whether a list is a leaf, as it is in a row of a source.

    Returns:
        The same structure of what the function returned.
    """
    if isinstance(structure, dict):
        return {
            key: map_leaves(function, value, f"{name}[{key!r}]", lists_are_leaves)
            for key, value in structure.items()
        }
    if isinstance(structure, tuple if lists_are_leaves else (tuple, list)):
        items = [
            map_leaves(function, value, f"{name}[{i}]", lists_are_leaves)
            for i, value in enumerate(structure)
        ]
        return type(structure)(*items) if hasattr(structure, "_fields") else tuple(items)
    return function(structure, name)


def leaves(structure: Any, name: str = "") -> list[Any]:
    """Returns the leaves of nested dicts, tuples and lists, in order."""
    found: list[Any] = []
    map_leaves(lambda leaf, _: found.append(leaf), structure, name)
    return found


def checked_columns(columns: dict[str, Any], num_examples: int) -> dict[str, Any]:
    """Returns columns as arrays of exactly `num_examples` rows.

    Args:
        columns: Dict of `x`, `y`, `sample_weight`: structures of arrays, tensors, or None.
        num_examples: The number of rows that each must have.

    Returns:
        The columns that are not None, as structures of contiguous arrays.

    Raises:
        TypeError: A leaf does not hold dense numbers or strings.
        ValueError: A leaf has another number of rows.
    """
    present = {name: column for name, column in columns.items() if column is not None}
    for name, column in present.items():
        if not leaves(column):
            raise ValueError(f"Expected `{name}` to hold an array. Received: {name}={column!r}.")
    if "x" not in present:
        raise TypeError("Expected `x` to hold the examples. Received: x=None.")
    return {
        name: map_leaves(
            lambda leaf, name: array_of_examples(leaf, name, num_examples), column, name
        )
        for name, column in present.items()
    }


def array_of_examples(leaf: Any, name: str, num_examples: int) -> np.ndarray:
    """Returns a leaf as an array of exactly `num_examples` rows; see `as_array`.

    Args:
        leaf: An array, a tensor, or another object that NumPy can turn into one.
        name: Its name, for the message.
        num_examples: The number of rows that it must have.

    Returns:
        A contiguous array.

    Raises:
        TypeError: The leaf does not hold dense numbers or strings.
        ValueError: It has another number of rows.
    """
    hint = (
        f"num_examples={num_examples} is a public constant of the plan and not taken from the "
        "data: make the plan for the number of rows you have."
    )
    return _array_of_rows(leaf, name, num_examples, hint)


def _array_of_rows(leaf: Any, name: str, rows: int, hint: str) -> np.ndarray:
    """Returns the array of a leaf, which must have this number of rows."""
    array = as_array(leaf, name)
    if array.ndim == 0 or len(array) != rows:
        raise ValueError(
            f"Expected `{name}` to have {rows} rows, one for each example. Received: "
            f"{name}.shape={array.shape}. {hint}"
        )
    return array


def as_array(leaf: Any, name: str) -> np.ndarray:
    """Returns a contiguous array; float64 becomes Keras's float, as in Keras, and strings bytes.

    Args:
        leaf: An array, a tensor, or another object that NumPy can turn into one.
        name: Its name, for the message.

    Returns:
        The array itself where nothing has to change.

    Raises:
        TypeError: It does not hold dense numbers or strings.
    """
    if isinstance(leaf, (tf.RaggedTensor, tf.SparseTensor, tf.IndexedSlices)) or (
        type(leaf).__module__.startswith("scipy.sparse")
    ):
        raise TypeError(
            f"Expected `{name}` to be dense. Received: {name} of type {type(leaf).__name__}. Use "
            "`.to_tensor()` for a ragged tensor, and `tf.sparse.to_dense` or `.toarray()` for a "
            "sparse one."
        )
    if isinstance(leaf, np.ma.MaskedArray) or not hasattr(leaf, "__array__"):
        raise TypeError(
            f"Expected `{name}` to be a NumPy array, a tensor, a nested dict, tuple or list of "
            f"them, or (for x) a tf.data.Dataset or a source of rows, with `__len__` and "
            f"`__getitem__`. Received: {name} of type {type(leaf).__name__}. Use "
            "`np.asarray(...)` for plain numbers; a generator or DataLoader has no row numbers to "
            "sample from."
        )
    try:
        array = np.asarray(leaf)
    except (NotImplementedError, TypeError, ValueError, RuntimeError) as error:
        raise TypeError(
            f"Expected `{name}` to have values. Received: {name} of type {type(leaf).__name__}, "
            f"which NumPy cannot turn into an array: {error}"
        ) from error
    if array.dtype == np.float64:
        array = array.astype(keras.config.floatx())
    if array.dtype.kind in "OSU":
        array = _as_bytes(array, name)
    try:
        tf.as_dtype(array.dtype)
    except TypeError as error:
        raise TypeError(
            f"Expected `{name}` to have a dtype that TensorFlow knows. Received: "
            f"{name}.dtype={array.dtype}."
        ) from error
    return np.ascontiguousarray(array) if array.ndim else array


def _as_bytes(array: np.ndarray, name: str) -> np.ndarray:
    """Returns strings as objects of type bytes, as TensorFlow has them."""
    encoded = np.empty(array.shape, object)
    for position, value in enumerate(array.flat):
        if isinstance(value, str):
            value = value.encode("utf-8")
        if not isinstance(value, bytes):
            raise TypeError(
                f"Expected `{name}` to hold numbers or strings. Received: {name} with dtype=object "
                f"and an entry of type {type(value).__name__}. Pad rows of different lengths to "
                "one length."
            )
        encoded.flat[position] = value
    return encoded


def refuse_strings(spec: dict[str, Any]) -> dict[str, Any]:
    """Returns the specs of columns, none of which may hold strings.

    Args:
        spec: Dict of structures of `tf.TensorSpec`.

    Returns:
        The same.

    Raises:
        TypeError: A column holds strings.
    """

    def refuse(leaf: tf.TensorSpec, name: str) -> None:
        if leaf.dtype == tf.string:
            raise TypeError(
                f"Expected `{name}` to hold numbers when it is sampled. Received: {name} of "
                "strings. Turn them into numbers with `plan.batches(..., preprocess=...)`, for "
                "example `lambda x, y: (text_vectorization(x), y)`. Only `fit` of a keras_hub task "
                "that has a preprocessor turns raw rows into numbers by itself."
            )

    for name, column in spec.items():
        map_leaves(refuse, column, name)
    return spec


def lists_as_arrays(structure: Any) -> Any:
    """Returns a structure with an array for each list of plain numbers or strings.

    Args:
        structure: Nested dicts, tuples and lists, or a leaf. Of lists that hold anything else, the
            entries are looked at.
    """
    if isinstance(structure, list) and structure:
        if all(isinstance(entry, (str, bytes)) for entry in structure):
            return np.asarray(structure, object)
        if all(isinstance(entry, (bool, numbers.Real)) for entry in structure):
            return np.asarray(structure)
    if isinstance(structure, dict):
        return {key: lists_as_arrays(value) for key, value in structure.items()}
    if isinstance(structure, (tuple, list)):
        parts = [lists_as_arrays(value) for value in structure]
        return type(structure)(*parts) if hasattr(structure, "_fields") else type(structure)(parts)
    return structure


def read_dataset(dataset: tf.data.Dataset, num_examples: int) -> dict[str, Any]:
    """Reads a dataset of single examples once, and returns its columns.

    A dataset of unknown length (records, generators) is read up to one example too many.

    Args:
        dataset: A dataset of `x`, `(x, y)` or `(x, y, sample_weight)`.
        num_examples: The number of examples that it must have.

    Returns:
        Dict of the columns there are.

    Raises:
        TypeError: Elements are ragged or sparse.
        ValueError: The number of examples is another one, or they have several shapes.
    """
    refuse_composites(dataset.element_spec, "the dataset")
    advice = (
        " The dataset must yield single examples, and exactly the plan's number of them: use "
        "`dataset.unbatch()` if it yields batches, and no `.repeat()`."
    )
    cardinality = int(dataset.cardinality())
    if cardinality == tf.data.INFINITE_CARDINALITY:
        raise ValueError(
            f"Expected `x` to be a finite dataset. Received: infinite cardinality.{advice}"
        )
    if cardinality >= 0 and cardinality != num_examples:
        raise ValueError(
            f"Expected `x` to yield num_examples={num_examples} examples. Received: a dataset of "
            f"{cardinality}.{advice}"
        )
    options = tf.data.Options()
    options.deterministic = True
    chunks = dataset.with_options(options).take(num_examples + 1).batch(_CHUNK_ROWS)
    elements = (unpacked(chunk, "the dataset") for chunk in chunks)
    try:
        return _stacked(elements, num_examples, "the dataset", advice)
    except tf.errors.InvalidArgumentError as error:
        raise ValueError(
            "Expected `x` to yield single examples of one shape, padded to one length. Received: "
            "a dataset that could not be read. Use `dataset.unbatch()` if it yields batches. "
            f"TensorFlow says: {error.message}"
        ) from error


def refuse_composites(element_spec: Any, source: str) -> None:
    """Refuses elements that are ragged or sparse.

    Args:
        element_spec: That of a dataset.
        source: What the dataset is called in the message.

    Raises:
        TypeError: An element is not a dense tensor.
    """

    def refuse(spec: Any, name: str) -> None:
        if not isinstance(spec, tf.TensorSpec):
            raise TypeError(
                f"Expected `{name}` of {source} to be a dense tensor. Received: "
                f"{type(spec).__name__}. Map it to dense tensors first (`.to_tensor()`, "
                "`tf.sparse.to_dense`)."
            )

    for name, column in unpacked(element_spec, source).items():
        map_leaves(refuse, column, name)


def preprocessed(
    columns: dict[str, Any],
    preprocess: Callable[..., Any],
    check: bool = True,
    rows_at_a_time: int | None = None,
) -> dict[str, Any]:
    """Applies `preprocess` in chunks of rows, and keeps the user's sample weights.

    Args:
        columns: Checked columns.
        preprocess: Function of `(x)` or `(x, y)`; see `PrivateBatches`.
        check: Whether to try the first row by itself, too.
        rows_at_a_time: The rows of a chunk; None for many.

    Returns:
        The columns that it returned, not yet checked.

    Raises:
        TypeError: `preprocess` is not callable.
        ValueError: It mixes or drops rows, or loses `y`.
    """
    if not callable(preprocess):
        raise TypeError(
            f"Expected `preprocess` to be a function. Received: preprocess={preprocess!r}."
        )
    given = [columns[name] for name in ("x", "y") if name in columns]

    def outputs(start: int, stop: int) -> dict[str, Any]:
        arguments = [
            map_leaves(lambda array, _: tf.convert_to_tensor(array[start:stop]), column, "")
            for column in given
        ]
        result = unpacked(preprocess(*arguments), "`preprocess`")
        if "y" in columns and "y" not in result:
            raise ValueError(
                "Expected `preprocess` to return (x, y) when there is a `y`. Received: only x from "
                "preprocess(x, y)."
            )

        def checked(leaf: Any, name: str) -> np.ndarray:
            hint = "`preprocess` must keep the number of rows."
            return _array_of_rows(leaf, name, stop - start, hint)

        return {
            name: map_leaves(checked, column, f"{name} of preprocess")
            for name, column in result.items()
        }

    num_examples, size = len(leaves(columns["x"])[0]), rows_at_a_time or _CHUNK_ROWS
    starts = range(0, num_examples, size)
    first = outputs(0, min(size, num_examples))
    if check:
        _check_first_row(first, outputs(0, 1))
    rest = (outputs(start, min(start + size, num_examples)) for start in starts[1:])
    result = _stacked(itertools.chain([first], rest), num_examples, "`preprocess`", "")
    if "sample_weight" in columns:
        if "sample_weight" in result:
            raise ValueError(
                "Expected `sample_weight` to come from one place. Received: sample_weight and a "
                "`preprocess` that returns (x, y, sample_weight)."
            )
        result["sample_weight"] = columns["sample_weight"]
    return result


def _check_first_row(chunk: dict[str, Any], alone: dict[str, Any]) -> None:
    """Refuses a row that depends on its neighbors: it would not be the row of one person."""
    same = chunk.keys() == alone.keys()
    for ours, theirs in zip(leaves(chunk), leaves(alone), strict=True):
        same = same and ours.shape[1:] == theirs.shape[1:] and ours.dtype == theirs.dtype
        if same and not np.array_equal(ours[:1], theirs):
            # Sums of another shape round differently; integers and strings do not.
            one, other = (np.asarray(rows, np.float64) for rows in (ours[:1], theirs))
            inexact = ours.dtype.kind not in "biuO"
            same = inexact and np.allclose(one, other, rtol=1e-3, atol=1e-5, equal_nan=True)
    if not same:
        raise ValueError(
            "Expected `preprocess` to treat each row by itself, always in the same way, and to "
            "give all rows one shape. Received: a preprocess whose first row differs when the "
            "other rows are left out. Pad to a fixed length; use no statistics of a batch and no "
            "mixing of rows. What is random, such as masks, belongs into `augment=` of "
            "`plan.batches`, or into the model."
        )


def unpacked(element: Any, source: str) -> dict[str, Any]:
    """Returns the columns of `x`, `(x,)`, `(x, y)` or `(x, y, sample_weight)`, as Keras does.

    Args:
        element: What a dataset yields or a function returns.
        source: What it is called in the message.

    Returns:
        Dict of the columns there are.

    Raises:
        ValueError: It is a tuple of more than three.
    """
    if not isinstance(element, tuple) or hasattr(element, "_fields"):
        element = (element,)
    if not 1 <= len(element) <= 3:
        raise ValueError(
            f"Expected elements of {source} to be x, (x, y) or (x, y, sample_weight). Received: a "
            f"tuple of {len(element)}. Put several inputs or targets into a dict."
        )
    columns = dict(zip(("x", "y", "sample_weight"), element, strict=False))
    return {name: column for name, column in columns.items() if column is not None}


def _stacked(
    chunks: Iterable[dict[str, Any]], num_examples: int, source: str, advice: str
) -> dict[str, Any]:
    """Returns chunks of rows as one, with each row copied once."""
    whole: dict[str, Any] = {}
    filled = 0
    for chunk in chunks:
        arrays = {
            name: map_leaves(lambda leaf, _: np.asarray(leaf), column, name)
            for name, column in chunk.items()
        }
        if not whole:
            whole = {
                name: map_leaves(
                    lambda array, _: np.empty((num_examples, *array.shape[1:]), array.dtype),
                    column,
                    name,
                )
                for name, column in arrays.items()
            }
        rows = len(leaves(arrays)[0])
        if filled + rows > num_examples:
            raise ValueError(
                f"Expected {source} to yield num_examples={num_examples} examples. Received: "
                f"more.{advice}"
            )
        for target, array in zip(leaves(whole), leaves(arrays), strict=True):
            if target.shape[1:] != array.shape[1:]:
                raise ValueError(
                    f"Expected {source} to give all rows one shape. Received: shapes "
                    f"{target.shape[1:]} and {array.shape[1:]}. Pad to a fixed length."
                )
            target[filled : filled + rows] = array
        filled += rows
    if filled != num_examples:
        raise ValueError(
            f"Expected {source} to yield num_examples={num_examples} examples. Received: "
            f"{filled}.{advice}"
        )
    return whole
