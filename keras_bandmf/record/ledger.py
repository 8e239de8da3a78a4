"""A ledger of the private runs on one data set: a folder, and one statement of all in it."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import os
import pathlib
import uuid
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import keras

from keras_bandmf import _distribution
from keras_bandmf._checks import PrivacyError
from keras_bandmf.planning.statement import Statement
from keras_bandmf.record import history
from keras_bandmf.record.composition import compose
from keras_bandmf.record.history import PastRun
from keras_bandmf.record.run_record import RunRecord

#: In the statement of each run; that of the ledger leaves it out.
ONE_OF_SEVERAL = (
    "a PrivacyLedger keeps this run: what was chosen among its runs costs what the `statement()` "
    "of the ledger says, and not this epsilon, unless all of them are composed here"
)


class PrivacyLedger(keras.callbacks.Callback):
    """Writes every private `fit` that it is given to into a folder, and composes all of them.

    Trying twice costs twice: every run on the private data, also one that is thrown away, adds to
    the epsilon of what is chosen in the end. Use one ledger for a data set, and give it to every
    `fit` on these rows, or to the `search` of a `keras_tuner.Tuner`, which refuses to train private
    models without one (see docs/tuning.md).

    Formal guarantees:
        A run is written down, charged in full, before its first step. When `fit` ends, it is
        charged what `keras_bandmf.statement` of it says, and later calls of `fit` in this process
        update the entry, given the ledger or not. So runs that fail, are stopped early or are
        killed with their process count. A run that goes on from a checkpoint of one that ended or
        was killed counts in place of it: the steps after the checkpoint count once, which holds
        only if nothing that the first run made of them was looked at (a caveat says so). Only a
        `fit` that made no step is taken out again. Earlier runs on the weights are written down
        with it. The rows themselves are not compared: that the runs of a
        folder are those on one data set, and all of them, is what the user says.

    Args:
        folder: Where the runs are, or will be, written: one JSON file each, without keys or data.
            It is made if it does not exist. Several processes may share it. An existing one is
            gone on with.

    Raises:
        TypeError: `folder` is not a path.

    Example:
        >>> import keras, tempfile, numpy as np
        >>> import keras_bandmf as bandmf
        >>> plan = bandmf.TrainingPlan(
        ...     num_examples=100, batch_size=10, epochs=2, noise_multiplier=2.0, delta=1e-5,
        ...     num_bands=1)
        >>> x, y = np.zeros((100, 3)), np.zeros((100, 1))
        >>> ledger = bandmf.callbacks.PrivacyLedger(tempfile.mkdtemp())
        >>> for learning_rate in (0.1, 0.2):
        ...     model = bandmf.privatize(
        ...         keras.Sequential([keras.Input((3,)), keras.layers.Dense(1)]))
        ...     sgd = keras.optimizers.SGD(learning_rate)
        ...     model.compile(bandmf.BandMFOptimizer(sgd, plan), loss="mse")
        ...     history = model.fit(x, y, verbose=0, callbacks=[ledger])
        >>> both = ledger.statement()
        >>> len(both.runs), both.epsilon > plan.epsilon()
        (2, True)
    """

    def __init__(self, folder: str | os.PathLike):
        super().__init__()
        if not isinstance(folder, (str, os.PathLike)):
            raise TypeError(
                "Expected `folder` to be the path of a folder for the runs on one data set. "
                f"Received: folder={folder!r}. Use for example `PrivacyLedger('runs_on_my_data')`."
            )
        self._folder = pathlib.Path(folder).absolute()
        self._private_fits = 0

    @property
    def folder(self) -> pathlib.Path:
        """Where the runs are written."""
        return self._folder

    def __deepcopy__(self, memo: dict) -> PrivacyLedger:
        """A copy, as KerasTuner makes one for each trial, writes to the same folder."""
        return type(self)(self._folder)

    def on_train_begin(self, logs: dict | None = None) -> None:
        """Refuses a `fit` that is not private, of which nothing would be written down.

        Raises:
            PrivacyError: It is not.
        """
        if not self._private_fits:
            raise PrivacyError(
                "PrivacyLedger writes down private runs, and this `fit` is not one. Call "
                "`keras_bandmf.privatize(model)` first, or remove the callback if the data is "
                f"public. Received: the model {self.model.name!r}, which is not private."
            )

    def add(self, statement: Statement) -> None:
        """Adds runs of which there is only a statement, such as those made without this ledger.

        Args:
            statement: The statement of a run, or of several. A run that is in the ledger already
                counts once.

        Raises:
            TypeError: It is not a `Statement`.
        """
        if not isinstance(statement, Statement):
            raise TypeError(
                "Expected `statement` to be a Statement, for example from "
                f"`keras_bandmf.statement(model)`. Received: {type(statement).__name__}."
            )
        for run in history.of_statement(statement):
            # An older statement of the run must not take the place of a later one.
            self._write(f"{run.run_id} added {run.past.to_json()}", [run])

    def statement(self, delta: float | None = None) -> Statement:
        """Returns one statement of all runs of the ledger, as if all were released.

        Formal guarantees: see `record.composition.compose`: sequential composition of all runs.
        It covers whatever was computed from them, such as the choice of the best by public data.

        Args:
            delta: In (0, 1); None takes that of the last run.

        Returns:
            The statement. `keras_bandmf.privatize(model, history=...)` takes it for a model that is
            trained next, with what was learned from these runs.

        Raises:
            ValueError: There is no run, a file is damaged, or the runs cannot be composed.
        """
        found: list[PastRun] = []
        for path in sorted(self._folder.glob("*.json")):
            try:
                found += history.from_json(path.read_text(encoding="utf-8"))[0]
            except (KeyError, TypeError, ValueError) as error:
                raise ValueError(
                    "Expected every .json file in the folder of a PrivacyLedger to be one that it "
                    f"wrote. Received: {path}, which is not ({error}). A run that was lost still "
                    "counts."
                ) from error
        every = [run.statement() for run in history.distinct(found)]
        statements = [run for run in every if run.steps_charged]
        if not statements:
            raise ValueError(
                "No private run is in this ledger. Give it to `fit`, or to `tuner.search`, as in "
                f"`callbacks=[ledger]`. Received: folder={str(self._folder)!r}, without a run."
            )
        whole = compose(statements, delta)
        caveats = tuple(caveat for caveat in whole.caveats if caveat != ONE_OF_SEVERAL)
        return dataclasses.replace(whole, caveats=caveats)

    @contextlib.contextmanager
    def expected(self) -> Iterator[None]:
        """Tells `on_train_begin` that a private `fit` runs inside."""
        self._private_fits += 1
        try:
            yield
        finally:
            self._private_fits -= 1

    def _path(self, name: str) -> pathlib.Path:
        # The id of a run that was restored holds slashes.
        return self._folder / f"{hashlib.sha256(name.encode()).hexdigest()[:32]}.json"

    def _write(self, name: str, runs: Iterable[PastRun]) -> None:
        self._folder.mkdir(parents=True, exist_ok=True)
        path = self._path(name)
        # Another process may read it, and this one may be killed.
        part = path.with_suffix(f".{uuid.uuid4().hex}")
        part.write_text(history.to_json([], list(runs)), encoding="utf-8")
        part.replace(path)

    @contextlib.contextmanager
    def noting(
        self, record: RunRecord, model: keras.Model, remarks: Sequence[str]
    ) -> Iterator[None]:
        """Writes a run down before its first step, and again after the last one of a `fit`.

        Args:
            record: The record of the run.
            model: The model, built.
            remarks: What the reader of a statement must know about the callbacks of the `fit`.

        Yields:
            Nothing; `fit` runs inside, with the record of the call.
        """
        # A loop of the user's own may make the steps that are left, and tells no ledger.
        loops = record.plan.declares_participations
        first_id, made_steps = record.run_id, record.steps > 0
        self._note(record, model, True, remarks)
        try:
            yield
        finally:
            if record.steps:
                self._note(record, model, loops)
            went_on = record.steps if record.run_id == first_id else _has_past(model, first_id)
            if not made_steps and not went_on:
                # It never began: it failed, or a callback restored another run in its place.
                self._path(first_id).unlink(missing_ok=True)

    def _note(
        self, record: RunRecord, model: keras.Model, in_full: bool, remarks: Sequence[str] = ()
    ) -> None:
        past = record.describe(in_full)
        caveats = (*history.caveats(model.weights), *past.caveats, *remarks)
        past = dataclasses.replace(past, caveats=tuple(dict.fromkeys(caveats)))
        earlier = [
            PastRun(run.run_id, run.started, run.statement())
            for run in history.runs_of(model.weights)
            if run is not record
        ]
        self._write(record.run_id, [*earlier, PastRun(record.run_id, record.started, past)])


def _has_past(model: keras.Model, run_id: str) -> bool:
    """Returns whether a run made steps on the model before another one was restored."""
    return any(run.run_id == run_id for run in history.runs_of(model.weights))


@contextlib.contextmanager
def written_down(
    record: RunRecord, model: keras.Model, callbacks: Iterable[Any], remarks: Sequence[str]
) -> Iterator[None]:
    """Writes a `fit` into the ledgers among its callbacks, and into those of earlier calls.

    Args:
        record: The record of the run.
        model: The model, built.
        callbacks: The callbacks of the `fit`.
        remarks: What the reader of a statement must know about them.

    Yields:
        Nothing; `fit` runs inside, with the record of the call.
    """
    given = [callback for callback in callbacks if isinstance(callback, PrivacyLedger)]
    for each in given:
        record.ledgers.setdefault(each.folder, each)
    ledgers = list(record.ledgers.values())
    distribution = model.distribute_strategy
    if _distribution.is_multi_worker(distribution) and not distribution.extended.should_checkpoint:
        ledgers = []  # the chief writes: each worker has a record, all of the same run
    with contextlib.ExitStack() as stack:
        for each in given:
            stack.enter_context(each.expected())
        for ledger in ledgers:
            stack.enter_context(ledger.noting(record, model, remarks))
        yield
