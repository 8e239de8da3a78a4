"""What one optimizer did to the variables it trains, and the statement that follows from it."""

from __future__ import annotations

import contextlib
import dataclasses
import threading
import time
import uuid
import weakref
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import keras

from keras_bandmf._checks import checked_int
from keras_bandmf.noise.finite import affords_tail, tail_total_variation
from keras_bandmf.planning.plan import TrainingPlan
from keras_bandmf.planning.plan_target import PlanOfRun
from keras_bandmf.planning.statement import Statement

_LOOP = "a custom training loop, in an order declared by the user"


@dataclasses.dataclass(frozen=True)
class Fit:
    """One call of `fit`.

    Attributes:
        source: What was trained on, in words.
        first_step: The optimizer's counter before it.
        last_step: The optimizer's counter after it.
        completed: Whether it ended at the step that was asked for.
        remarks: What the reader of a statement must know about it.
    """

    source: str
    first_step: int
    last_step: int
    completed: bool
    remarks: tuple[str, ...] = ()


def steps_at_restore(run_id: str, earlier: str) -> int | None:
    """Returns the steps of run `earlier` that run `run_id` went on from; None if it did not.

    The id of a run that went on from a checkpoint is that of the checkpoint's run, "/", the steps
    of the checkpoint, "-" and something random.

    Args:
        run_id: The id of the later run.
        earlier: The id of the earlier run.

    Returns:
        A number of steps, or None.
    """
    if not run_id.startswith(f"{earlier}/"):
        return None
    return int(run_id.removeprefix(f"{earlier}/").split("-")[0])


class RunRecord:
    """The record of one optimizer's run. The variables it trains keep it (see `history`).

    It holds neither data nor keys, and does not keep the optimizer alive.

    Args:
        plan_of_run: The plan of the run, which may only be made later.
        l2_norm_clip: The clip norm.
        clipping: The clipping mode, in words.
        seeded: Whether the noise was drawn from a fixed seed.
    """

    def __init__(self, plan_of_run: PlanOfRun, l2_norm_clip: float, clipping: str, seeded: bool):
        self.run_id = uuid.uuid4().hex
        self.started = time.time_ns()
        self._plan_of_run = plan_of_run
        self._planned_before: Any = None  # by the `fit` of another process
        self.fits: list[Fit] = []
        self._under_way: Callable[[], list[Fit]] = list  # the `fit` that has not ended yet
        self.looped = False
        self.restore_failed = False
        self.broken: str | None = None  # why what ran is not what is accounted for
        self.lock = threading.Lock()  # held by a `fit`
        self.ledgers: dict[Any, Any] = {}  # by folder: they follow the run from then on
        self._clip = l2_norm_clip, clipping
        self._seeded = seeded
        self._restores = 0
        self._replayed = False
        self._carriers = ""
        self._exact_noise, self._exact_before = False, True
        self._steps = 0
        self._num_values = 0.0
        self._iterations: Any = None
        self._counters: list[Any] = []
        self._optimizer: Any = lambda: None

    @property
    def plan(self) -> TrainingPlan:
        """The plan of the run.

        Raises:
            ValueError: If it is not made yet.
        """
        return self._plan_of_run.plan

    def __deepcopy__(self, memo: dict) -> RunRecord:
        """A run is one: copies of its variables share its record."""
        return self

    def follow(self, optimizer: Any) -> None:
        """Reads steps and origin from a built `BandMFOptimizer` from now on.

        Args:
            optimizer: The optimizer whose run this is.
        """
        self._optimizer = weakref.ref(optimizer)
        # They outlive the optimizer. An interrupted step has moved those of the noise alone.
        self._iterations = optimizer.iterations
        noise = optimizer.run_state.noise
        self._counters = noise.counters
        self._num_values = float(noise.layout.size) * noise.num_steps
        self.update()

    def update(self) -> None:
        """Takes over what the optimizer knows now, if it still exists."""
        self._steps = self.steps
        optimizer = self._optimizer()
        if optimizer is None:
            return
        state = optimizer.run_state
        self._seeded = self._seeded or state.seeded
        self._restores = max(self._restores, state.restores)
        self._replayed = self._replayed or state.replayed
        self._carriers = str(state.carriers)
        self._exact_noise = state.noise.exact and self._exact_before

    @property
    def steps(self) -> int:
        """The most steps the run is known to have made, in this process or before a restore."""
        return max([self.noted_steps, *(int(counter.numpy()) for counter in self._counters)])

    @property
    def noted_steps(self) -> int:
        """The same as `steps`, without counters that a restore may still be about to change."""
        return max([self._steps, *(fit.last_step for fit in self.fits)])

    def goes_back_to(self, run_id: str) -> bool:
        """Returns whether this is the run of that id, or went on from a checkpoint of it."""
        return self.run_id == run_id or steps_at_restore(self.run_id, run_id) is not None

    @contextlib.contextmanager
    def fit(
        self,
        source: str,
        remarks: Sequence[str],
        epochs: int,
        steps_per_epoch: int | None,
    ) -> Iterator[None]:
        """Records one call of `fit`, also one that fails.

        Args:
            source: What was trained on, in words.
            remarks: What the reader of a statement must know about its callbacks.
            epochs: The number of epochs that was asked for.
            steps_per_epoch: The number of steps of each; None if unknown.

        Yields:
            Nothing; `fit` runs inside.
        """
        self.update()
        first = self._counted()
        requested = self.plan.num_steps
        if steps_per_epoch is not None:
            requested = min(requested, first + epochs * steps_per_epoch)
        completed = False
        # A checkpoint of an epoch must say what the callbacks did, too.
        self._under_way = lambda: [Fit(source, first, self._counted(), False, tuple(remarks))]
        try:
            yield
            completed = True
        finally:
            self._under_way = list
            last = self._counted()
            # Whoever stopped it earlier has looked at weights or metrics: charge all steps then.
            completed = completed and last == requested
            self.fits.append(Fit(source, first, last, completed, tuple(remarks)))
            self.update()

    def _counted(self) -> int:
        iterations = self._iterations
        return 0 if iterations is None else int(keras.ops.convert_to_numpy(iterations))

    def check_restored(self) -> None:
        """Refuses to go on, or to state anything, after a restore that failed.

        Raises:
            ValueError: The weights may be those of another run.
        """
        if self.restore_failed:
            raise ValueError(
                "A checkpoint could not be restored into this optimizer, but Keras may have loaded "
                "its weights. Received: weights that may be those of another run. Load a "
                "checkpoint of this run, or start over with a new model."
            )

    def statement(self) -> Statement:
        """Returns the statement of this run alone.

        Formal guarantees:
            Fewer than all steps of the plan are charged only if one uninterrupted `fit` in this
            process made them all and ended where it was asked to. Otherwise the decision to stop
            or to go on may have depended on released weights, as that of EarlyStopping does even
            on public validation data, and a custom training loop may depend on them, too. A fixed
            seed of noise or sampler withdraws the claim, and so does an epsilon so large that the
            finite tails of the noise cost more than their share of delta
            (`noise.finite.affords_tail`).

        Returns:
            The statement.

        Raises:
            ValueError: A restore failed, so that the weights may hold steps of another run.
        """
        self.check_restored()
        return self.describe()

    def describe(self, in_full: bool = False) -> Statement:
        """Returns the statement of the steps made, whether or not a restore failed after them.

        Args:
            in_full: Whether all steps of the plan are charged, whatever ran so far.
        """
        self.update()
        steps_run = min(self.steps, self.plan.num_steps)
        charged = self.plan.num_steps if in_full else self._steps_charged(steps_run)
        planned = self.plan.statement(charged)
        caveats = [*planned.caveats, *self._caveats(steps_run, charged)]
        reason, origin = None, "the operating system"
        if self._seeded:
            reason = "noise or batches were drawn from a fixed seed"
            origin = "a fixed seed (tests only)"
        drawn = self._iterations is not None
        reason = self.broken or reason
        tail = self._noise_tail() if drawn else None
        if reason is None and tail is not None:
            if not affords_tail(tail, planned.delta, planned.epsilon):
                reason = (
                    "epsilon is so large that the finite tails of the noise cost more than delta "
                    "allows (use noise='exact' or more noise)"
                )
        if not planned.private:
            reason = planned.not_private_reason
        elif not drawn:
            reason = None
        sources = [fit.source for fit in self._every_fit()] + [_LOOP] * self.looped
        mechanism = [planned.mechanism, self._carriers]
        mechanism += ["noise rounded exactly"] * self._exact_noise
        return dataclasses.replace(
            planned,
            executed=True,
            mechanism="; ".join(filter(None, mechanism)),
            steps_run=steps_run,
            l2_norm_clip=self._clip[0],
            clipping=self._clip[1],
            key_origin=origin if drawn else "none drawn yet",
            data="; ".join(dict.fromkeys(sources))
            or ("none in this process" if steps_run else "none yet"),
            caveats=tuple(dict.fromkeys(caveats)),
            private=reason is None,
            not_private_reason=reason,
            run_id=self.run_id,
            noise_tail=tail,
        )

    def _every_fit(self) -> list[Fit]:
        return [*self.fits, *self._under_way()]

    def _noise_tail(self) -> float:
        return 0.0 if self._exact_noise else tail_total_variation(self._num_values)

    def _steps_charged(self, steps_run: int) -> int:
        if not steps_run:
            return 0
        # The optimizer alone may have gone back: the weights still hold what these fits did.
        if len(self.fits) != 1 or self.looped or self._restores or self._counted() != steps_run:
            return self.plan.num_steps
        (fit,) = self.fits
        whole = fit.first_step == 0 and fit.last_step == steps_run
        return steps_run if whole and fit.completed else self.plan.num_steps

    def _caveats(self, steps_run: int, charged: int) -> list[str]:
        caveats = []
        if charged > steps_run:
            caveats.append(
                f"{steps_run} steps ran, but all {charged} are charged: training was interrupted, "
                "resumed or extended, and that may have depended on what it had produced so far"
            )
        if 0 < steps_run < self.plan.num_steps and charged == steps_run:
            caveats.append(
                f"the plan is not used up: {steps_run} of its {self.plan.num_steps} steps ran, "
                "with noise that was scaled for all of them"
            )
        if self._plan_of_run.target is not None or self._planned_before is not None:
            caveats.append(
                f"the plan was made in the first `fit`: num_examples = {self.plan.num_examples} is "
                "the number of rows that it trained on, and is taken as public, as are its batch "
                "size and its epochs; the guarantee compares data sets under this one plan"
            )
        caveats += [remark for fit in self._every_fit() for remark in fit.remarks]
        if self.looped:
            caveats.append(
                "a custom training loop made steps: if it was compiled, nobody checked that "
                "nothing else changed the weights between them"
            )
        if self._restores:
            caveats.append(
                f"restored from a checkpoint {self._restores} times: steps that were repeated "
                "after a restore are covered only if their first results were never released"
            )
        if self._replayed:
            caveats.append(
                "replay=True kept the noise key: the first results of the repeated steps must "
                "never have been released, because the same noise on two gradients cancels out"
            )
        if self.plan.declares_participations:
            caveats.append(
                "the order of the data was declared by the user and is not enforced by this "
                "library: "
                f"at most {self.plan.participations} participations of a row, at least "
                f"{self.plan.separation} steps apart"
            )
        return caveats

    def to_facts(self) -> dict[str, Any]:
        """Returns what a file keeps of the run, as JSON values, without its keys.

        A plan that was given is left out: whoever restores the file gives it again.
        """
        self.update()
        return {
            "run_id": self.run_id,
            "started": self.started,
            "steps": self.steps,
            "looped": self.looped,
            "exact_noise": self._exact_noise,
            "broken": self.broken,
            "planned_in_fit": self._plan_of_run.to_facts() or self._planned_before,
            "fits": [dataclasses.asdict(fit) for fit in self._every_fit()],
        }

    def take_over(self, facts: dict[str, Any]) -> None:
        """Goes on from the run of a file.

        Formal guarantees:
            Its id is a new one, which names that of the file and its steps. Another run that goes
            on from the same file has another id.

        Args:
            facts: What `to_facts` returned, read from the file.

        Raises:
            ValueError: The facts are damaged.
        """
        try:
            fits = [_fit_of(fit) for fit in facts["fits"]]
            steps = checked_int("steps", facts["steps"], minimum=0)
            started = checked_int("started", facts["started"], minimum=0)
            looped, run_id = bool(facts["looped"]), str(facts["run_id"])
            broken = facts["broken"]
        except (KeyError, TypeError) as error:
            raise ValueError(
                "Expected the record of a run in the checkpoint, but it is damaged. Received: "
                f"{facts!r} ({error}). Use another checkpoint."
            ) from None
        if not self.goes_back_to(run_id):  # the caller keeps what was done before
            self.started = started
            self.looped, self._steps, self.fits = False, 0, []
        self.run_id = f"{run_id}/{steps}-{uuid.uuid4().hex}"
        self.looped = self.looped or looped
        self._exact_before = self._exact_before and facts.get("exact_noise") is True
        self.broken = self.broken or broken
        self._planned_before = facts.get("planned_in_fit") or self._planned_before
        self._steps = max(self._steps, steps)
        self.fits = list(dict.fromkeys([*fits, *self.fits]))


def _fit_of(facts: dict[str, Any]) -> Fit:
    """Returns a fit as a file keeps it."""
    # Earlier releases also wrote the step at which the fit was to end.
    facts = {name: value for name, value in facts.items() if name != "requested_step"}
    return Fit(**(facts | {"remarks": tuple(facts["remarks"])}))
