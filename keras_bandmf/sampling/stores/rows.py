"""Sources that return one row at a time: anything with `__len__` and `__getitem__`."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np

from keras_bandmf.sampling.sources import as_array, unpacked
from keras_bandmf.sampling.stores.workers import Turns, Workers


class _Leaf(NamedTuple):
    """What each row has at one place of its structure; `place` numbers these places."""

    name: str
    shape: tuple[int, ...]
    dtype: np.dtype
    place: int


class Rows:
    """The rows of a source, decoded and written into the arrays of a batch.

    Formal guarantees:
        * Row i is `decode(source[i])`, with the structure, shapes and dtypes of row 0, or an error
          that names the row.
        * Without `shared`, one call of the source runs at a time, whatever the number of workers.

    Args:
        source: Has `__len__` and `__getitem__(int)`, and perhaps `__getitems__(list)`.
        num_examples: The number of rows that it must have.
        decode: Turns an element into `x`, `(x, y)` or `(x, y, sample_weight)`; None for nothing.
        shared: Whether several threads may read the source at the same time.

    Raises:
        TypeError: Row 0 holds something else than dense numbers or strings.
        ValueError: The number of rows is another one, or row 0 is not the same when read again.
        RuntimeError: Row 0 cannot be read.
    """

    def __init__(
        self,
        source: Any,
        num_examples: int,
        decode: Callable[[Any], Any] | None,
        shared: bool,
    ):
        self._source, self._num_examples, self._decode = source, num_examples, decode
        self._turns = contextlib.nullcontext() if shared else Turns()
        self.check_length()
        first, again = self._columns_of(0), self._columns_of(0)
        self._leaves: list[_Leaf] = []
        self._template = {
            name: mapped(self._new_leaf, column, name) for name, column in first.items()
        }
        buffers = self._buffers(2)
        self._put(0, first, buffers, 0)
        self._put(0, again, buffers, 1)
        if not all(_same(buffer[:1], buffer[1:]) for buffer in buffers):
            raise ValueError(
                "Expected a source whose rows are the same whenever they are read. Received: a "
                "source that gave two different values for row 0. Leave random augmentation out of "
                "the source and of `decode` (put it into the model)."
            )

    def check_length(self) -> None:
        """Refuses a source whose number of rows is not, or no longer, that of the plan.

        Raises:
            ValueError: The number of rows is another one.
        """
        found = len(self._source)
        if found != self._num_examples:
            raise ValueError(
                f"Expected `x` to have num_examples={self._num_examples} rows. Received: a source "
                f"of type {type(self._source).__name__} and length {found}. num_examples is a "
                "public constant of the plan: make the plan for the number of rows you have, and "
                "do not change the source while it is in use."
            )

    def in_memory(self) -> dict[str, Any]:
        """Returns nothing: rows are known by reading them."""
        return {}

    def read(self, indices: np.ndarray, workers: Workers) -> dict[str, Any]:
        """Returns rows, in the order of their numbers in `indices`.

        Args:
            indices: (k,) int64.
            workers: The threads that read and decode.

        Returns:
            Dict of structures of new arrays.

        Raises:
            TypeError: A row holds another dtype than row 0, or no dense numbers or strings.
            ValueError: A row has another structure or shape than row 0.
            RuntimeError: A row cannot be read or decoded.
        """
        buffers = self._buffers(len(indices))

        def fill(places: np.ndarray) -> None:
            numbers = indices[places].tolist()
            for place, number, element in zip(
                places.tolist(), numbers, self._elements(numbers), strict=True
            ):
                self._put(number, self._decoded(number, element), buffers, place)

        # In the order of the source, where neighbors are often read together.
        workers.each(fill, workers.split(np.argsort(indices, kind="stable")))
        return {
            name: mapped(lambda leaf, _: buffers[leaf.place], column, name)
            for name, column in self._template.items()
        }

    def _new_leaf(self, value: Any, name: str) -> _Leaf:
        array = _leaf_array(value, name, 0)
        leaf = _Leaf(name, array.shape, array.dtype, len(self._leaves))
        self._leaves.append(leaf)
        return leaf

    def _buffers(self, rows: int) -> list[np.ndarray]:
        return [np.empty((rows, *leaf.shape), leaf.dtype) for leaf in self._leaves]

    def _elements(self, numbers: list[int]) -> Iterator[Any]:
        """Yields the elements with these numbers."""
        if len(numbers) > 1 and hasattr(self._source, "__getitems__"):
            try:
                with self._turns:
                    together = list(self._source.__getitems__(numbers))
            except Exception:
                # Read one by one, the row that fails is found, or none does.
                together = None
            if together is not None and len(together) != len(numbers):
                raise ValueError(
                    f"Expected `__getitems__` of {type(self._source).__name__} to return "
                    f"{len(numbers)} rows for as many numbers. Received: {len(together)}."
                )
            if together is not None:
                yield from together
                return
        for number in numbers:
            yield self._element(number)

    def _element(self, number: int) -> Any:
        try:
            with self._turns:
                return self._source[number]
        except Exception as error:
            raise RuntimeError(
                f"Row {number} of the source cannot be read: {type(error).__name__}: {error}"
            ) from error

    def _columns_of(self, number: int) -> dict[str, Any]:
        return self._decoded(number, self._element(number))

    def _decoded(self, number: int, element: Any) -> dict[str, Any]:
        if self._decode is not None:
            try:
                element = self._decode(element)
            except Exception as error:
                raise RuntimeError(
                    f"`decode` fails on row {number} of the source: {type(error).__name__}: {error}"
                ) from error
        columns = unpacked(element, f"row {number} of the source")
        if "x" not in columns:
            raise TypeError(
                f"Expected row {number} of the source to be x, (x, y) or (x, y, sample_weight). "
                "Received: x=None."
            )
        return columns

    def _put(
        self, number: int, columns: dict[str, Any], buffers: list[np.ndarray], place: int
    ) -> None:
        """Writes a row into its place of a batch."""

        def put(template: Any, value: Any, name: str) -> None:
            if isinstance(template, _Leaf) and not isinstance(value, (dict, tuple)):
                self._put_leaf(number, template, value, buffers[template.place], place)
            elif isinstance(template, _Leaf):
                raise self._other_form(number, name, template, value)
            elif isinstance(template, dict):
                if not isinstance(value, dict) or value.keys() != template.keys():
                    raise self._other_form(number, name, template, value)
                for key, part in template.items():
                    put(part, value[key], name)
            else:
                if not isinstance(value, tuple) or len(value) != len(template):
                    raise self._other_form(number, name, template, value)
                for part, each in zip(template, value, strict=True):
                    put(part, each, name)

        if columns.keys() != self._template.keys():
            raise self._other_form(number, "the element", self._template, columns)
        for name, column in columns.items():
            put(self._template[name], column, name)

    def _put_leaf(
        self, number: int, leaf: _Leaf, value: Any, buffer: np.ndarray, place: int
    ) -> None:
        array = value
        if type(value) is not np.ndarray or value.dtype != leaf.dtype:
            array = _leaf_array(value, leaf.name, number)
        if array.dtype != leaf.dtype:
            raise TypeError(
                f"Expected all rows of the source to have one dtype. Received: {leaf.name} of "
                f"{array.dtype} in row {number}, and of {leaf.dtype} in row 0. Give it one dtype, "
                "for example in `decode`."
            )
        if array.shape != leaf.shape:
            raise ValueError(
                f"Expected all rows of the source to have one shape. Received: {leaf.name} of "
                f"shape {array.shape} in row {number}, and {leaf.shape} in row 0. Pad to a fixed "
                "length, for example in `decode`."
            )
        buffer[place] = array[()]

    def _other_form(self, number: int, name: str, template: Any, value: Any) -> ValueError:
        return ValueError(
            f"Expected all rows of the source to have one structure. Received: {name} of row "
            f"{number} is {_form(value)}, and that of row 0 is {_form(template)}."
        )


def mapped(function: Callable[[Any, str], Any], structure: Any, name: str) -> Any:
    """As `map_leaves`, where a list or a `_Leaf` is a leaf."""
    if isinstance(structure, (list, _Leaf)) or not isinstance(structure, (dict, tuple)):
        return function(structure, name)
    if isinstance(structure, dict):
        return {
            key: mapped(function, value, f"{name}[{key!r}]") for key, value in structure.items()
        }
    items = [mapped(function, value, f"{name}[{i}]") for i, value in enumerate(structure)]
    return type(structure)(*items) if hasattr(structure, "_fields") else tuple(items)


def plain_array(value: Any) -> np.ndarray:
    """Returns numbers, lists and strings as arrays; strings keep zeros at their end."""
    if not isinstance(value, (str, bytes)):
        return np.asarray(value)
    array = np.empty((), object)
    array[()] = value
    return array


def _leaf_array(value: Any, name: str, number: int) -> np.ndarray:
    """Returns a leaf of a row as an array; a list is one, too, and so are numbers and strings."""
    name = f"{name} of row {number}"
    if value is None:
        raise TypeError(
            f"Expected `{name}` to hold numbers or strings. Received: None. Fill in what is "
            "missing, for example in `decode`."
        )
    plain = isinstance(value, (list, int, float, complex, str, bytes))
    if plain or hasattr(value, "__array_interface__"):  # the last are images of PIL
        try:
            value = plain_array(value)
        except ValueError as error:
            raise ValueError(
                f"Expected `{name}` to be an array of one shape. Received: a list that NumPy "
                f"cannot turn into one: {error}. Return a tuple for several values, and pad lists "
                "to one length, for example in `decode`."
            ) from error
    if not hasattr(value, "__array__"):
        raise TypeError(
            f"Expected `{name}` to be an array, a tensor, a number, a string or a list of numbers. "
            f"Received: {name} of type {type(value).__name__}. Turn elements into arrays with "
            "`decode`."
        )
    return as_array(value, name)


def _same(ours: np.ndarray, theirs: np.ndarray) -> bool:
    if ours.dtype == object:
        return bool(np.array_equal(ours, theirs))
    return ours.tobytes() == theirs.tobytes()  # NaN, too


def _form(value: Any) -> str:
    if isinstance(value, dict):
        return f"a dict of {sorted(map(str, value))}"
    if isinstance(value, tuple) and not isinstance(value, _Leaf):
        return f"a tuple of {len(value)}"
    return "an array" if isinstance(value, _Leaf) else f"of type {type(value).__name__}"
