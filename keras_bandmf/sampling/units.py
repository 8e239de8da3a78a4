"""The rows of each unit of privacy, such as a person, and which of them take part in a step."""

from __future__ import annotations

import hashlib
import unicodedata
from typing import Any, NamedTuple

import numpy as np

from keras_bandmf._checks import checked_int


class ChosenRows(NamedTuple):
    """The rows that stand for units in one step.

    Attributes:
        numbers: (units, rows_per_unit) int64 row numbers.
        valid: (units, rows_per_unit) bool. False where a unit has fewer rows; the number is then
            that of another row of the same unit.
    """

    numbers: np.ndarray
    valid: np.ndarray


class Units:
    """Which rows belong to which unit of privacy; a unit is its place among the sorted ids.

    Formal guarantees: every row belongs to exactly one unit, that of its id. `choose` returns
    rows of the units asked for and of no others, each row at most once where `valid` is true. So
    a batch in which each unit stands once holds at most `rows_per_unit` rows of it.

    Args:
        ids: (rows,) integers, at least 0, or strings that are not empty: whose row it is. All
            rows of a person must carry the same id, byte for byte: under two ids a person is two
            units, and protected half as well.
        num_units: The plan's public number of units, all of which have rows.
        rows_per_unit: The largest number of rows of a unit that take part in a step.

    Raises:
        TypeError: `ids` is not a vector of integers or strings, or a number is not an integer.
        ValueError: An id is missing or negative, or the number of units is another one.

    Example:
        >>> import numpy as np
        >>> from keras_bandmf.sampling.units import Units
        >>> units = Units(np.array(["b", "a", "b", "b"]), num_units=2, rows_per_unit=2)
        >>> chosen = units.choose(np.array([0, 1]), np.zeros((2, 2), np.uint64))
        >>> chosen.numbers.tolist(), chosen.valid.tolist()
        ([[1, 1], [0, 3]], [[True, False], [True, True]])
    """

    def __init__(self, ids: Any, num_units: int, rows_per_unit: int):
        ids = _checked_ids(ids)
        hint = "It is the largest number of rows of a unit that take part in a step."
        self._rows_per_unit = checked_int("rows_per_unit", rows_per_unit, hint=hint)
        self._order = np.argsort(ids, kind="stable")
        ids = ids[self._order]
        first = np.flatnonzero(np.concatenate([[True], ids[1:] != ids[:-1]])) if len(ids) else ids
        if len(first) != num_units:
            raise ValueError(
                f"Expected `unit` to name num_examples={num_units} units. Received: {len(first)} "
                "different ids. The plan counts units, not rows, and a unit without rows cannot "
                "be sampled: make the plan for the number of units that have rows."
            )
        self._bounds = np.concatenate([first, [len(ids)]]).astype(np.int64)

    @property
    def num_rows(self) -> int:
        """The number of rows of all units."""
        return len(self._order)

    @property
    def rows_per_unit(self) -> int:
        """The largest number of rows of a unit that take part in a step."""
        return self._rows_per_unit

    def choose(self, units: np.ndarray, words: np.ndarray) -> ChosenRows:
        """Returns the rows of units that take part in a step.

        A unit with at most `rows_per_unit` rows sends all of them. Of any other, each set of
        `rows_per_unit` rows is equally likely, up to 2^-40 (R. W. Floyd's algorithm).

        Args:
            units: (units,) integers, numbers of units.
            words: (units, rows_per_unit) uint64, random.

        Returns:
            The rows.
        """
        size = self._rows_per_unit
        starts, counts = self._bounds[units], self._bounds[units + 1] - self._bounds[units]
        picks = np.empty((len(units), size), np.int64)
        for turn in range(size):
            # Floyd: a place among the first `last + 1`, or the last one if that is taken.
            last = np.maximum(counts - size + turn, 0)
            place = (words[:, turn] % (last + 1).astype(np.uint64)).astype(np.int64)
            taken = (picks[:, :turn] == place[:, None]).any(axis=1)
            picks[:, turn] = np.where(taken, last, place)
        few = counts <= size
        turns = np.arange(size)
        picks = np.where(few[:, None], turns % counts[:, None], picks)
        valid = ~few[:, None] | (turns < counts[:, None])
        return ChosenRows(self._order[starts[:, None] + picks], valid)

    def digest(self, key: bytes) -> bytes:
        """Returns 32 bytes that depend on which rows belong to which unit.

        Args:
            key: At most 64 bytes.
        """
        hasher = hashlib.blake2b(key=key, digest_size=32)
        for part in (self._order, self._bounds):
            hasher.update(np.ascontiguousarray(part, "<i8").data)
        return hasher.digest()


def _checked_ids(ids: Any) -> np.ndarray:
    """Returns ids as a vector of integers or strings, none of them missing."""
    way_out = "Give one id a row: an integer, at least 0, or a string that is not empty."
    if isinstance(ids, np.ma.MaskedArray) or not hasattr(ids, "__array__"):
        raise TypeError(
            "Expected `unit` to be an array of ids. Received: unit of type "
            f"{type(ids).__name__}. {way_out}"
        )
    array = np.asarray(ids)
    if array.ndim != 1:
        raise ValueError(
            f"Expected `unit` to be a vector. Received: unit.shape={array.shape}. {way_out}"
        )
    if array.dtype == object:
        array = _strings(array, way_out)
    if array.dtype.kind not in "iuSU":
        raise TypeError(
            "Expected `unit` to hold integers or strings. Received: "
            f"unit.dtype={array.dtype}. {way_out}"
        )
    is_number = array.dtype.kind in "iu"
    missing = array < 0 if is_number else np.char.str_len(np.char.strip(array)) == 0
    if missing.any():
        row = int(np.argmax(missing))
        raise ValueError(
            f"Expected no id of `unit` to be negative or missing. Received: unit[{row}]="
            f"{array[row]!r}. {way_out} A row whose unit is unknown has to be left out."
        )
    if not is_number:
        _refuse_spellings(array)
    return array


def _refuse_spellings(ids: np.ndarray) -> None:
    """Refuses ids that differ only in what nobody sees: space around them, or Unicode forms."""
    if ids.dtype.kind == "S":
        return
    spellings: dict[str, str] = {}
    for each in np.unique(ids).tolist():
        first = spellings.setdefault(unicodedata.normalize("NFKC", each).strip(), each)
        if first != each:
            raise ValueError(
                "Expected all rows of a unit to carry the same id, character for character. "
                f"Received: {first!r} and {each!r} in `unit`, which look alike. Normalize them "
                "with `unicodedata.normalize('NFKC', id).strip()`."
            )


def _strings(array: np.ndarray, way_out: str) -> np.ndarray:
    """Returns an array of objects as one of strings."""
    kinds = {type(value) for value in array}
    if kinds not in ({str}, {bytes}, set()):
        row = next((i for i, v in enumerate(array) if not isinstance(v, (str, bytes))), 0)
        raise TypeError(
            "Expected `unit` to hold integers, or strings of one type. Received: "
            f"unit[{row}]={array[row]!r} among values of the types "
            f"{sorted(kind.__name__ for kind in kinds)}. {way_out}"
        )
    return array.astype(np.bytes_ if kinds == {bytes} else np.str_)
