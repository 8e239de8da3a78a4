"""The unit of privacy of a plan: a row of the data, or whoever several rows belong to."""

from __future__ import annotations

from typing import Any

from keras_bandmf.planning.statement import NOT_COVERED
from keras_bandmf.sampling.schedule import Schedule

#: The unit of a plan that counts rows.
ROW = "example"


def checked_unit(unit: Any, min_separation: int | None) -> str:
    """Returns the name of the unit of a plan.

    Formal guarantees: a plan that counts units other than rows draws its batches itself. Nobody
    would clip the rows of one unit together in data that the user feeds.

    Args:
        unit: A noun in the singular: letters, digits, spaces, hyphens and underscores; "example"
            for a row, and no other spelling of that.
        min_separation: That of the plan: not None if the user feeds the data.

    Raises:
        TypeError: It is not a string.
        ValueError: It is no such word; or the user feeds the data.
    """
    if not isinstance(unit, str):
        raise TypeError(
            "Expected `unit` to be a word for what the guarantee protects, such as 'example' or "
            f"'user'. Received: unit of type {type(unit).__name__}. The ids of the rows are an "
            "argument of `plan.batches(unit=...)`."
        )
    hidden = unit != unit.strip() or (unit != ROW and unit.casefold() in (ROW, "row"))
    if not unit or hidden or not unit.replace("-", "").replace("_", "").replace(" ", "").isalnum():
        raise ValueError(
            "Expected `unit` to be a word for what the guarantee protects, such as 'example' or "
            f"'user'. Received: unit={unit!r}."
        )
    if unit != ROW and min_separation is not None:
        raise ValueError(
            "Expected no declared participations, because rows of one unit that the user feeds "
            f"would be clipped one by one. Received: unit={unit!r}, "
            f"min_separation={min_separation}. Leave `min_separation` and "
            "`max_participations` out, and train on `plan.batches(x, y, unit=ids)`."
        )
    return unit


def unit_in_words(unit: str) -> str:
    """Returns what one unit is, as a privacy statement says it after "one"."""
    return "row of the training data" if unit == ROW else f"{unit}, with all rows of that {unit}"


def sampling_in_words(schedule: Schedule, unit: str) -> str:
    """Returns how batches are drawn, in words for what the plan counts.

    Args:
        schedule: The schedule of the plan.
        unit: The unit of the plan.
    """
    words = schedule.in_words()
    if unit == ROW:
        return words
    return words.replace("an example", f"one {unit}").replace("example", unit)


def not_covered(unit: str) -> tuple[str, ...]:
    """Returns what the guarantee of a plan says nothing about.

    Args:
        unit: The unit of the plan.
    """
    if unit == ROW:
        return NOT_COVERED
    in_units = {
        "the number of rows,": f"the number of different ids, num_examples: treated as public. "
        f"Under add-or-remove-one, a neighboring data set has one {unit} more or fewer. The "
        "mechanism samples at the same rate, and epsilon compares the two; but a run on any number "
        "of ids other than num_examples is refused, which reveals the number",
        "several rows of one person": f"two ids of one {unit}: the guarantee is for all rows with "
        "one id",
    }

    def text_of(text: str) -> str:
        changed = [new for start, new in in_units.items() if text.startswith(start)]
        return changed[0] if changed else text

    return tuple(text_of(text) for text in NOT_COVERED)


def check_unit_ids(unit: str, ids: Any) -> None:
    """Refuses ids of rows for a plan that counts rows, and no ids for one that counts units.

    Args:
        unit: The unit of the plan.
        ids: The argument `unit` of `plan.batches`.

    Raises:
        ValueError: One is given without the other.
    """
    if (unit == ROW) == (ids is None):
        return
    if ids is None:
        raise ValueError(
            f"Expected `unit` to hold an id for each row, because the plan counts units of the "
            f"kind {unit!r}. Received: unit=None. Pass `plan.batches(x, y, unit=ids)`; to "
            "`tfx_input.private_batches`, `unit_key`."
        )
    raise ValueError(
        "Expected `unit` to be None, because the plan counts rows. Received: unit of type "
        f"{type(ids).__name__}. Make the plan with `TrainingPlan(unit='user', ...)`, and count "
        "users in `num_examples` and `batch_size`."
    )
