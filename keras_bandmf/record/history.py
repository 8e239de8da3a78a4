"""The history of variables: which private runs trained them, and what they held before that."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import os
import uuid
import zipfile
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import keras
import numpy as np

from keras_bandmf._checks import PrivacyError, checked_int
from keras_bandmf.accounting.composition import delta_of_ideal_noise
from keras_bandmf.planning.documents import read_document, write_document
from keras_bandmf.planning.plan import TrainingPlan
from keras_bandmf.planning.statement import Statement
from keras_bandmf.planning.units import unit_in_words
from keras_bandmf.record.composition import check_same
from keras_bandmf.record.fresh import is_fresh, is_noted, small_enough
from keras_bandmf.record.run_record import RunRecord, steps_at_restore

_ATTRIBUTE = "_keras_bandmf_history"
_FORMAT, _VERSION = "keras_bandmf.History", 1
MEMBER = "keras_bandmf_history.json"


@dataclasses.dataclass(frozen=True)
class PastRun:
    """A run that is over for this process: what a file, or the user, says of it.

    Attributes:
        run_id: The id of the run.
        started: When it began, in nanoseconds since the epoch; runs are listed in this order.
        past: Its statement.
    """

    run_id: str
    started: int
    past: Statement

    def statement(self) -> Statement:
        """Returns the statement of the run."""
        return self.past


Run = RunRecord | PastRun


class _History:
    """What is known of one variable. It is kept on the variable, so that nothing loses it."""

    def __init__(self) -> None:
        self.runs: list[Run] = []
        self.is_known: bool | None = None
        self.seen: tuple[int, bytes] | None = None

    def steps(self) -> int:
        """Returns the number of steps of all runs that still go on in this process."""
        return sum(run.steps for run in self.runs if isinstance(run, RunRecord))


def _of(variable: keras.Variable) -> _History:
    """Returns the history of a variable, and begins it if there is none."""
    history = getattr(variable, _ATTRIBUTE, None)
    if history is None:
        history = _History()
        setattr(variable, _ATTRIBUTE, history)
    return history


def observe(variables: Sequence[keras.Variable]) -> None:
    """Decides, before a run, what the variables hold: initial values, what runs left, or unknown.

    Formal guarantees:
        A variable is taken for fresh only if its value is, bit for bit, what its own layer's
        initializer gives from its fixed seed (see `fresh`). One that private runs have trained is
        known only if it was fresh before the first, and if its value is still the one it had after
        the last `fit`, step of an eager loop, or restored checkpoint; values that changed otherwise
        make it unknown, for good. Changes between the steps of a compiled loop are not seen.

    Args:
        variables: The variables of a model or optimizer.
    """
    if not small_enough(variables):
        for variable in variables:
            _of(variable).is_known = False
        return
    for variable in variables:
        history = _of(variable)
        if history.is_known is None:
            history.is_known = is_fresh(variable)
        elif changed([variable]):
            history.is_known &= not history.steps() and is_fresh(variable)
        history.seen = history.steps(), _digest(variable)


def inherit(weights: Sequence[keras.Variable], trainable: Sequence[keras.Variable]) -> None:
    """Notes that variables are about to be trained with gradients that run through all weights.

    Formal guarantees:
        Every run that trained any of the weights is from now on in the history of each variable
        that is trained with them; if the history of one of the weights is unknown, so is theirs.

    Args:
        weights: All weights that gradients run through.
        trainable: The variables that will be trained.
    """
    runs = runs_of(weights)
    known = not unknown(weights)
    for variable in trainable:
        for run in runs:
            add([variable], run)
        if not known:
            _of(variable).is_known = False


def begin(variables: Sequence[keras.Variable], record: RunRecord) -> None:
    """Puts the record of an optimizer that is being built into the history of its variables.

    Args:
        variables: The variables that the optimizer trains.
        record: Its record.
    """
    if not record.restore_failed:  # while one is under way, its file says what the values are
        observe([variable for variable in variables if is_noted(variable)])
    add(variables, record)


@contextlib.contextmanager
def remembering(variables: Sequence[keras.Variable]) -> Iterator[None]:
    """Notes the values that a `fit` leaves in variables, so that later changes are seen.

    Args:
        variables: The weights of the model.

    Yields:
        Nothing; `fit` runs inside.
    """
    try:
        yield
    finally:
        remember(variables)


def remember(variables: Sequence[keras.Variable]) -> None:
    """Notes the values of variables after private steps, so that later changes are seen."""
    if small_enough(variables):
        for variable in variables:
            _of(variable).seen = _of(variable).steps(), _digest(variable)


def changed(variables: Iterable[keras.Variable]) -> list[str]:
    """Returns the paths of variables whose values changed other than by private steps."""
    paths = []
    for variable in variables:
        seen = _of(variable).seen
        if seen is not None and seen[0] == _of(variable).steps() and seen[1] != _digest(variable):
            paths.append(variable.path)
    return paths


def _digest(variable: keras.Variable) -> bytes:
    return hashlib.sha256(np.asarray(keras.ops.convert_to_numpy(variable)).tobytes()).digest()


def add(variables: Iterable[keras.Variable], run: Run) -> None:
    """Puts a run into the history of the variables it trains."""
    for variable in variables:
        runs = _of(variable).runs
        if run not in runs:
            runs.append(run)


def check_plan(variables: Iterable[keras.Variable], plan: TrainingPlan) -> None:
    """Refuses to begin a run that could not be composed with earlier ones on the variables.

    Args:
        variables: The weights of the model.
        plan: The plan of the run.

    Raises:
        ValueError: The guarantees of the runs are about different neighbors, a restore failed, or
            the delta of the plan is too small for the noise of the earlier runs.
    """
    found: list[str] = [plan.adjacency]
    units: list[str] = [unit_in_words(plan.unit)]
    deltas: list[float] = []
    for run in runs_of(variables):
        if isinstance(run, PastRun):
            found.append(run.past.adjacency)
            units.append(run.past.unit)
            deltas += [one.delta for one in (run.past.runs or (run.past,))]
        else:
            run.check_restored()
            found += [run.plan.adjacency] * (run.steps > 0)
            units += [unit_in_words(run.plan.unit)] * (run.steps > 0)
            deltas += [run.plan.delta] * (run.steps > 0)
    check_same("adjacency", found)
    check_same("unit", units)
    delta_of_ideal_noise([*deltas, plan.delta], plan.delta)


def runs_of(variables: Iterable[keras.Variable]) -> list[Run]:
    """Returns the runs that trained any of the variables, in the order in which they began.

    Formal guarantees:
        A run that is over is left out only if another one holds all its steps: the same run, later,
        or one that went on from a checkpoint of it, of no fewer steps. Each restore begins a run
        with an id of its own, so that two that went on from one checkpoint are both kept.

    Args:
        variables: The variables to look at.

    Returns:
        The runs, each once.
    """
    found: dict[int, Run] = {id(run): run for v in variables for run in _of(v).runs}
    return distinct(found.values())


def distinct(runs: Iterable[Run]) -> list[Run]:
    """Returns the runs without those that others hold, as `runs_of` explains."""
    found = list(runs)
    live = [run for run in found if isinstance(run, RunRecord)]
    past: dict[str, PastRun] = {}
    for run in found:
        if isinstance(run, PastRun):
            past[run.run_id] = max(past.get(run.run_id, run), run, key=_extent)
    kept: list[Run] = [*live, *past.values()]
    kept = [
        run
        for run in kept
        if isinstance(run, RunRecord) or not any(_holds(other, run) for other in kept)
    ]
    return sorted(kept, key=lambda run: run.started)


def _extent(run: PastRun) -> tuple[int, int, bool]:
    return run.past.steps_run, run.past.steps_charged, not run.past.private


def _holds(run: Run, part: PastRun) -> bool:
    """Returns whether all steps of `part` are among those of the other run."""
    if run is part:
        return False
    if run.run_id == part.run_id:
        return isinstance(run, RunRecord) and run.steps >= part.past.steps_run
    restored_at = steps_at_restore(run.run_id, part.run_id)
    return restored_at is not None and restored_at >= part.past.steps_run


def unknown(variables: Iterable[keras.Variable]) -> list[str]:
    """Returns the paths of variables whose values before the runs are not known."""
    return [v.path for v in variables if not _of(v).is_known]


def caveats(variables: Sequence[keras.Variable]) -> list[str]:
    """Returns what a statement says of variables whose values cannot be accounted for."""
    # Where no run trained a variable, it may be looked at now as well as before.
    observe([v for v in variables if _of(v).is_known is None])
    found, lost, moved = [], unknown(variables), changed(variables)
    if lost:
        found.append(
            f"history unknown of {len(lost)} of {len(variables)} weights ({_named(lost)}): they "
            "were loaded or set, or could not be shown to be initial values. What happened to them "
            "before is not counted. That is fine if they were trained on public data only; earlier "
            "training on this data must be added with `privatize(model, history=...)`"
        )
    if moved:
        found.append(
            f"{len(moved)} of {len(variables)} weights ({_named(moved)}) are not those that the "
            "last `fit` left: whatever produced the new values is not counted"
        )
    return found


def _named(paths: Sequence[str]) -> str:
    return ", ".join(paths[:3]) + (f" and {len(paths) - 3} more" if len(paths) > 3 else "")


def to_json(variables: Sequence[keras.Variable], extra_runs: Sequence[Run] = ()) -> str:
    """Returns the history of a model as JSON, which holds no key and no data.

    Args:
        variables: The weights of the model.
        extra_runs: Further runs to write, after those of the variables.

    Returns:
        JSON with the statement of each run.
    """
    entries = [
        {"run_id": run.run_id, "started": run.started, "statement": run.statement().to_json()}
        for run in [*runs_of(variables), *extra_runs]
    ]
    facts = {"runs": entries, "is_known": not unknown(variables) and not changed(variables)}
    return write_document(_FORMAT, _VERSION, facts, indent=2)


def from_json(text: str) -> tuple[list[PastRun], bool]:
    """Reads what `to_json` wrote.

    Args:
        text: JSON.

    Returns:
        The runs, and whether the values of the weights were known.

    Raises:
        ValueError: It is something else.
    """
    facts = read_document(text, _FORMAT, {_VERSION: {"runs", "is_known"}})
    runs = []
    for entry in facts["runs"]:
        past = Statement.from_json(entry["statement"])
        # `of_statement` counts from 0.
        started = checked_int("started", entry["started"], minimum=0)
        runs.append(PastRun(str(entry["run_id"]), started, past))
    return runs, facts["is_known"] is True


def take_over(variables: Sequence[keras.Variable], history: Statement | str | os.PathLike) -> None:
    """Adds to variables the history that the user has of them.

    Formal guarantees: none of its own. That the values are those that the history is of is what
    the user says; the runs in it are composed into every later statement.

    Args:
        variables: The weights of the model, as loaded.
        history: A `Statement`, the JSON of one, or the path of a `.keras` file that a private
            model wrote.

    Raises:
        TypeError: `history` is none of these.
        ValueError: The file holds no history, or the JSON is of another kind.
    """
    # What a statement does not know its caveats say, and those are kept.
    if isinstance(history, Statement):
        parsed = of_statement(history), True
    elif isinstance(history, str) and history.lstrip().startswith("{"):
        is_statement = json.loads(history).get("format") != _FORMAT
        parsed = (
            (of_statement(Statement.from_json(history)), True)
            if is_statement
            else from_json(history)
        )
    elif isinstance(history, (str, os.PathLike)):
        parsed = from_json(_read_member(history))
    else:
        raise TypeError(
            "Expected `history` to be a Statement, the JSON of one, or the path of a .keras file "
            f"that a private model saved. Received: history={history!r}."
        )
    runs, is_known = parsed
    for run in runs:
        add(variables, run)
    for variable in variables:
        own = _of(variable)
        before = own.is_known is not False and not changed([variable])
        own.is_known = before and is_known
        own.seen = own.steps(), _digest(variable)


def of_statement(statement: Statement) -> list[PastRun]:
    """Returns the runs of a statement. One without an id is another run each time it is given."""
    return [
        PastRun(run.run_id or uuid.uuid4().hex, number, run)
        for number, run in enumerate(statement.runs or (statement,))
    ]


def _read_member(path: str | os.PathLike) -> str:
    text = os.fspath(path)
    if zipfile.is_zipfile(text):
        with zipfile.ZipFile(text) as archive:
            if MEMBER in archive.namelist():
                return archive.read(MEMBER).decode()
    raise ValueError(
        "Expected `history` to be a .keras archive that `model.save` of a private model wrote, "
        f"which holds the history of its weights. Received: history={text!r}, without a history. "
        "Pass the `Statement` of the earlier runs instead."
    )


def write_member(path: str | os.PathLike, text: str) -> None:
    """Adds a history to a `.keras` archive, which Keras reads as before; leaves other files alone.

    Args:
        path: The file that Keras wrote.
        text: JSON from `to_json`.
    """
    if isinstance(path, (str, os.PathLike)) and zipfile.is_zipfile(os.fspath(path)):
        with zipfile.ZipFile(os.fspath(path), "a") as archive:
            archive.writestr(MEMBER, text)


def to_array(variables: Sequence[keras.Variable], record: RunRecord) -> np.ndarray:
    """Returns the history of an optimizer's variables, to be saved with its state.

    Args:
        variables: The variables that the optimizer trains.
        record: Its record.

    Returns:
        (k,) uint8, the bytes of JSON.
    """
    others = [run for run in runs_of(variables) if run is not record]
    facts = {
        "run": record.to_facts(),
        "others": [] if not others else to_json([], others),
        "is_known": [_of(v).is_known and not changed([v]) for v in variables],
        # Empty where looking takes too long: is_known is False then.
        "digests": [_digest(v).hex() if small_enough(variables) else "" for v in variables],
    }
    return np.frombuffer(json.dumps(facts).encode(), np.uint8)


def refuse_to_forget(variables: Sequence[keras.Variable]) -> None:
    """Refuses to save the state of an optimizer without a plan over weights of earlier runs.

    Args:
        variables: The variables that the optimizer will train.

    Raises:
        PrivacyError: Private runs have trained them, and the file would not name those runs.
    """
    if runs_of(variables):
        raise PrivacyError(
            "The weights were trained by earlier private runs, which this file would not name: an "
            "optimizer keeps them in its state, and has none before its first `fit`. Save before "
            "you compile with the new optimizer, or after its first epoch. Received: an optimizer "
            "without a plan"
        )


def planned_in_fit(array: np.ndarray | None) -> Any:
    """Returns what the history of a checkpoint says of a plan that a `fit` made; None for nothing.

    Args:
        array: What `to_array` wrote; None if the file has none.
    """
    try:
        return json.loads(np.asarray(array, np.uint8).tobytes())["run"]["planned_in_fit"]
    except (KeyError, TypeError, ValueError):
        return None


def from_array(
    array: np.ndarray | None, variables: Sequence[keras.Variable], record: RunRecord, own_steps: int
) -> None:
    """Takes over, at a restore, the history that `to_array` wrote.

    Args:
        array: The history; None if the file has none.
        variables: The variables that the optimizer trains.
        record: The record of the optimizer, which goes on as the run of the file.
        own_steps: The number of steps that it had made before the restore.

    Raises:
        ValueError: The history is damaged.
    """
    digests: list[bytes] = [b""] * len(variables)
    if array is None:
        known = [False] * len(variables)
    else:
        try:
            facts = json.loads(np.asarray(array, np.uint8).tobytes())
            run, others, known = facts["run"], facts["others"], facts["is_known"]
            others = from_json(others)[0] if others else []
            other_id = not record.goes_back_to(run["run_id"])
            digests = [bytes.fromhex(digest) for digest in facts["digests"]]
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(
                f"Expected a history in the checkpoint, but it is damaged: {error}. Received: "
                f"{len(array)} bytes. Use another checkpoint."
            ) from None
        if other_id and own_steps:
            # Released or not, this optimizer's own steps were made.
            add(variables, PastRun(record.run_id, record.started, record.describe()))
        record.take_over(run)
        for other in others:
            add(variables, other)
    for variable, is_known, digest in zip(variables, known, digests, strict=True):
        own = _of(variable)
        own.is_known = is_known if own.is_known is None else own.is_known and is_known
        # The values of the file come before or after this, and the step counter too.
        steps = own.steps() - record.steps + record.noted_steps
        own.seen = (steps, digest) if digest else None
