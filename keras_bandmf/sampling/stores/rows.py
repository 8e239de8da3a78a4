"""Sources that return one row at a time: anything with `__len__` and `__getitem__`."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import tensorflow as tf

from keras_bandmf._checks import PrivacyError
from keras_bandmf.sampling.sources import as_array, map_leaves, unpacked
from keras_bandmf.sampling.stores.workers import Turns, Workers

# In place of an element: its row is in the batch.
_DONE = object()

_CONSTANT = frozenset({str, bytes, int, float, complex, bool, type(None)})


@dataclasses.dataclass(frozen=True)
class _Leaf:
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
          No other call begins before the element is copied (or, where it holds an object of a
          type that is not known, before it is decoded and the row is in the batch): a source that
          uses its memory again cannot change a row that it returned.
        * Refused are: a source or `decode` whose values for the first, middle and last row share
          memory, change when another row is read, or (row 0) depend on what was read before; and
          a `__getitems__` that gives other bits for these rows than `__getitem__`, in an order
          that is not sorted.
        * Assumed is: with `shared`, that the source bears several threads; and always that
          `decode` does, and returns new arrays. Three rows cannot show the opposite in all cases.

    Args:
        source: Has `__len__` and `__getitem__(int)`, and perhaps `__getitems__(list)`.
        num_examples: The number of rows that it must have.
        decode: Turns an element into `x`, `(x, y)` or `(x, y, sample_weight)`; None for nothing.
            Must be thread-safe and return new arrays.
        shared: Whether several threads may read the source at the same time.

    Raises:
        TypeError: Row 0 holds something else than dense numbers or strings.
        PrivacyError: Rows share memory, or `__getitems__` differs from `__getitem__`.
        ValueError: The number of rows is another one, or row 0 is not the same when read again.
        RuntimeError: A row cannot be read.
    """

    def __init__(
        self,
        source: Any,
        num_examples: int,
        decode: Callable[[Any], Any] | None,
        shared: bool,
    ):
        self._source, self._num_examples, self._decode = source, num_examples, decode
        self._shared = shared
        self._turns = contextlib.nullcontext() if shared else Turns()
        self.check_length()
        self._leaves: list[_Leaf] = []
        self._template: dict[str, Any] = {}
        self._check_some_rows()

    def _check_some_rows(self) -> None:
        """Learns the form of row 0, and refuses what the class says."""
        last = self._num_examples - 1
        numbers = list(dict.fromkeys((0, last, self._num_examples // 2)))
        kept, singles = _Kept(type(self._source).__name__), []
        for number in numbers:
            with self._turns:
                element = self._element(number)
                columns = self._decoded(number, element)
                if not self._template:
                    self._template = {
                        name: map_leaves(self._new_leaf, column, name, lists_are_leaves=True)
                        for name, column in columns.items()
                    }
                singles.append(self._buffers(1))
                self._put(number, columns, singles[-1], 0)
                kept.add(number, (element, columns))
        kept.check("`__getitem__`")
        again = self._buffers(1)
        self._read_one(0, again, 0)
        if not _same(singles[0], again):
            raise ValueError(
                "Expected a source whose rows are the same whenever they are read. Received: a "
                "source that gave two different values for row 0. Leave random augmentation out of "
                "the source and of `decode` (put it into the model), and let no row depend on "
                "what was read before."
            )
        if hasattr(self._source, "__getitems__"):
            self._check_together(numbers, singles)

    def _check_together(self, numbers: list[int], singles: list[list[np.ndarray]]) -> None:
        """Compares `__getitems__` with `__getitem__`, in two orders."""
        expected = dict(zip(numbers, singles, strict=True))
        name = type(self._source).__name__
        kept = _Kept(name)
        # (last, 0, middle) is in no order that a source might return by itself.
        for order in (numbers[1:2] + numbers[:1] + numbers[2:], numbers):
            with self._turns:
                for number, element in zip(order, self._together(order), strict=True):
                    columns = self._decoded(number, element)
                    found = self._buffers(1)
                    self._put(number, columns, found, 0)
                    if not _same(expected[number], found):
                        raise PrivacyError(
                            f"Expected `__getitems__({order})` of {name} to return these rows in "
                            "this order, as `__getitem__` does. Received: another value for row "
                            f"{number}. Rows in another place would be trained on in steps that "
                            "the accounting does not cover. Return a list of new elements in the "
                            "order of the numbers, or remove `__getitems__`."
                        )
                    kept.add(number, (element, columns))
        kept.check("`__getitems__`")

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
        # Sorted, since neighbors are often read together, and each row once.
        numbers, first, back = np.unique(indices, return_index=True, return_inverse=True)
        buffers = self._buffers(len(indices))

        def fill(part: np.ndarray, go_on: Callable[[], None]) -> None:
            self._fill(numbers[part].tolist(), buffers, first[part].tolist(), go_on)

        workers.each(fill, workers.split(np.arange(len(numbers))))
        origin = first[back.reshape(-1)]
        copies = np.flatnonzero(origin != np.arange(len(indices)))
        for buffer in buffers:
            buffer[copies] = buffer[origin[copies]]
        return {
            name: map_leaves(lambda leaf, _: buffers[leaf.place], column, name)
            for name, column in self._template.items()
        }

    def _fill(
        self,
        numbers: list[int],
        buffers: list[np.ndarray],
        places: list[int],
        go_on: Callable[[], None],
    ) -> None:
        """Reads rows with these numbers into these places of a batch."""
        if len(numbers) == 1 or not hasattr(self._source, "__getitems__"):
            for number, place in zip(numbers, places, strict=True):
                go_on()
                self._read_one(number, buffers, place)
            return
        go_on()
        with self._turns:
            later = [
                self._taken(number, element, buffers, place)
                for number, element, place in zip(
                    numbers, self._together(numbers), places, strict=True
                )
            ]
        for number, element, place in zip(numbers, later, places, strict=True):
            if element is not _DONE:
                go_on()
                self._put(number, self._decoded(number, element), buffers, place)

    def _read_one(self, number: int, buffers: list[np.ndarray], place: int) -> None:
        with self._turns:
            element = self._taken(number, self._element(number), buffers, place)
        if element is not _DONE:
            self._put(number, self._decoded(number, element), buffers, place)

    def _taken(self, number: int, element: Any, buffers: list[np.ndarray], place: int) -> Any:
        """Returns an element that no later call of the source changes, to be decoded.

        To be called in the turn in which the element was read. Where there is nothing to decode,
        or the element cannot be copied, it writes the row and returns `_DONE`.
        """
        if self._shared:
            return element
        copy = _DONE if self._decode is None else _copied(element)
        if copy is _DONE:
            self._put(number, self._decoded(number, element), buffers, place)
        return copy

    def _new_leaf(self, value: Any, name: str) -> _Leaf:
        array = _leaf_array(value, name, 0)
        leaf = _Leaf(name, array.shape, array.dtype, len(self._leaves))
        self._leaves.append(leaf)
        return leaf

    def _buffers(self, rows: int) -> list[np.ndarray]:
        return [np.empty((rows, *leaf.shape), leaf.dtype) for leaf in self._leaves]

    def _together(self, numbers: list[int]) -> list[Any]:
        """Returns what `__getitems__` does, in a turn of the caller."""
        name = type(self._source).__name__
        try:
            together = list(self._source.__getitems__(list(numbers)))
        except Exception as error:
            for number in numbers:  # if one of them fails, its error is the better one
                self._element(number)
            raise RuntimeError(
                f"`__getitems__` of {name} fails on rows {numbers[0]} to {numbers[-1]}, which "
                f"`__getitem__` can read: {type(error).__name__}: {error}"
            ) from error
        if len(together) != len(numbers):
            raise PrivacyError(
                f"Expected `__getitems__` of {name} to return {len(numbers)} rows for as many "
                f"numbers. Received: {len(together)}. Return one element for each number, in the "
                "order of the numbers, or remove `__getitems__`."
            )
        return together

    def _element(self, number: int) -> Any:
        """Returns an element, in a turn of the caller."""
        try:
            return self._source[number]
        except Exception as error:
            raise RuntimeError(
                f"Row {number} of the source cannot be read: {type(error).__name__}: {error}"
            ) from error

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


class _Kept:
    """What a source and `decode` returned for some rows: nothing of it may change.

    Args:
        name: Of the type of the source.
    """

    def __init__(self, name: str):
        self._name = name
        self._rows: list[tuple[int, Any, list[Any]]] = []

    def add(self, number: int, values: Any) -> None:
        self._rows.append((number, values, _snapshot(values)))

    def check(self, method: str) -> None:
        """Refuses values that changed since they were added, or share memory with another row."""
        for place, (number, values, before) in enumerate(self._rows):
            same = _same(before, _snapshot(values))
            others = [other for n, other, _ in self._rows[:place] if n != number]
            if not same or any(_share_memory(values, other) for other in others):
                raise PrivacyError(
                    f"Expected {method} of {self._name}, and `decode`, to return new values for "
                    f"each row. Received: values for row {number} that "
                    f"{'share memory with' if same else 'changed by reading'} another row. "
                    "Threads that read at the same time would mix rows, and train on an example "
                    "in steps that the accounting does not cover. Return a copy "
                    "(`np.array(buffer)`), also of arrays that several rows have in common."
                )


def _parts(value: Any) -> Iterator[Any]:
    """Yields what is in dicts, lists and tuples, and the dicts and lists themselves."""
    if isinstance(value, (dict, list)) and value:
        yield value
    if isinstance(value, (dict, list, tuple)):
        for part in value.values() if isinstance(value, dict) else value:
            yield from _parts(part)
    else:
        yield value


def _array_at(value: Any) -> np.ndarray | None:
    """Returns the memory of an array, buffer or tensor as an array, which may be a view of it."""
    if isinstance(value, (bytearray, memoryview)):
        return np.asarray(value)
    if hasattr(value, "__array__") or hasattr(value, "__array_interface__"):
        with contextlib.suppress(Exception):  # `decode` may know what to do with it
            return np.asarray(value)
    return None


def _snapshot(values: Any) -> list[Any]:
    """Returns copies of all arrays and plain values."""
    found: list[Any] = []
    for part in _parts(values):
        array = _array_at(part)
        if array is not None:
            found.append(np.array(array))
        elif isinstance(part, (str, bytes, int, float, complex)):
            found.append(plain_array(part))
    return found


def _share_memory(ours: Any, theirs: Any) -> bool:
    """Returns whether two values have memory in common that can be written."""

    def changeable(values: Any) -> tuple[set[int], list[np.ndarray]]:
        parts = [part for part in _parts(values) if not isinstance(part, tf.Tensor)]
        arrays = [_array_at(part) for part in parts]
        containers = {id(part) for part in parts if isinstance(part, (dict, list))}
        return containers, [a for a in arrays if a is not None and not _of_bytes(a)]

    (containers, arrays), (other_containers, other_arrays) = changeable(ours), changeable(theirs)
    return not containers.isdisjoint(other_containers) or any(
        np.shares_memory(a, b) for a in arrays for b in other_arrays
    )


def _of_bytes(array: np.ndarray) -> bool:
    """Returns whether an array is a view of `bytes`, which nobody can change."""
    base: Any = array
    while isinstance(base, (np.ndarray, memoryview)):
        base = base.base if isinstance(base, np.ndarray) else base.obj
    return isinstance(base, bytes)


def _copied(value: Any) -> Any:
    """Returns a value that shares no memory that can change; `_DONE` if that is not known."""
    kind = type(value)
    if kind in _CONSTANT or isinstance(value, (np.number, np.bool_)):
        return value
    if kind in (np.ndarray, np.memmap) and not value.dtype.hasobject:
        return np.array(value)
    if kind is bytearray:
        return bytearray(value)
    if kind is dict:
        parts = {key: _copied(part) for key, part in value.items()}
        return _DONE if any(part is _DONE for part in parts.values()) else parts
    if kind is list and _CONSTANT.issuperset(map(type, value)):
        return value[:]
    if kind in (list, tuple):
        items = [_copied(part) for part in value]
        return _DONE if any(part is _DONE for part in items) else kind(items)
    return _DONE


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


def _same(ours: list[np.ndarray], theirs: list[np.ndarray]) -> bool:
    """Returns whether all arrays have the same shape, dtype and bits, NaN included."""

    def same(a: np.ndarray, b: np.ndarray) -> bool:
        if a.dtype != b.dtype or a.shape != b.shape:
            return False
        return bool(np.array_equal(a, b)) if a.dtype == object else a.tobytes() == b.tobytes()

    return len(ours) == len(theirs) and all(map(same, ours, theirs))


def _form(value: Any) -> str:
    if isinstance(value, dict):
        return f"a dict of {sorted(map(str, value))}"
    if isinstance(value, tuple):
        return f"a tuple of {len(value)}"
    return "an array" if isinstance(value, _Leaf) else f"of type {type(value).__name__}"
