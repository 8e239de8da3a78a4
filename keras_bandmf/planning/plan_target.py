"""The plan of a run that names only its target: made from the rows of the first `fit`."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator
from typing import Any, Literal, TypedDict

import keras

from keras_bandmf._checks import checked_int
from keras_bandmf.accounting.accountant import checked_delta, checked_epsilon
from keras_bandmf.planning.arguments import NumBands
from keras_bandmf.planning.band_choice import DEFAULT_MAX_BANDS
from keras_bandmf.planning.calibration import Amplification, resolved_amplification
from keras_bandmf.planning.keras_workload import workload_from_optimizer
from keras_bandmf.planning.plan import TrainingPlan
from keras_bandmf.planning.progress import CalibrationProgress
from keras_bandmf.sampling.laws import SamplingName
from keras_bandmf.strategies import Workload


class CalibrationOptions(TypedDict, total=False):
    """Arguments of `TrainingPlan.calibrate` that `BandMFOptimizer(epsilon=...)` takes, too."""

    epochs: int | None
    num_bands: NumBands
    sampling: SamplingName | Literal["auto"]
    max_bands: int
    amplification: Amplification


@dataclasses.dataclass(frozen=True, kw_only=True)
class PlanTarget:
    """What a plan is to reach, fixed before the number of rows is known.

    Attributes:
        epsilon: As in `TrainingPlan.calibrate`, which explains all of these but `epochs`.
        delta: See `epsilon`.
        epochs: The epochs of all calls of `fit` together; None for those of the first.
        num_bands: See `epsilon`.
        sampling: See `epsilon`.
        max_bands: See `epsilon`.
        amplification: See `epsilon`.

    Raises:
        TypeError: A value has the wrong type.
        ValueError: A value is out of range.
    """

    epsilon: float
    delta: float
    epochs: int | None = None
    num_bands: NumBands = "auto"
    sampling: SamplingName | Literal["auto"] = "cyclic_poisson"
    max_bands: int = DEFAULT_MAX_BANDS
    amplification: Amplification = "auto"

    def __post_init__(self) -> None:
        set_field = object.__setattr__
        set_field(self, "epsilon", checked_epsilon(self.epsilon))
        set_field(self, "delta", checked_delta(self.delta))
        resolved_amplification(self.amplification, self.sampling)
        set_field(self, "max_bands", checked_int("max_bands", self.max_bands))
        if self.epochs is not None:
            set_field(self, "epochs", checked_int("epochs", self.epochs))
        if not (isinstance(self.num_bands, str) and self.num_bands == "auto"):
            set_field(
                self, "num_bands", checked_int("num_bands", self.num_bands, hint="Or 'auto'.")
            )

    @classmethod
    def of_arguments(
        cls, plan: Any, epsilon: float | None, delta: float | None, options: Any
    ) -> PlanTarget | None:
        """Returns the target that the arguments of an optimizer name; None if they give a plan.

        Args:
            plan: The plan, or None.
            epsilon: The target, or None.
            delta: The target, or None.
            options: The `CalibrationOptions` that were given.

        Raises:
            TypeError: There is neither a plan nor a target, or an unknown option.
            ValueError: There is a plan and a target, or half a target.
        """
        unknown = sorted(set(options) - CalibrationOptions.__annotations__.keys())
        if unknown:
            raise TypeError(
                "Expected, beside `epsilon` and `delta`, only arguments of `TrainingPlan.calibrate`"
                f" among {', '.join(CalibrationOptions.__annotations__)}. Received: "
                f"{', '.join(unknown)}. For others, pass `plan=TrainingPlan.calibrate(...)`."
            )
        given = {"epsilon": epsilon, "delta": delta, **options}
        named = [name for name, value in given.items() if value is not None]
        if plan is not None:
            if named:
                raise ValueError(
                    "Expected `plan`, or `epsilon` and `delta` of a plan to be made, and not both. "
                    f"Received: a plan and {', '.join(named)}. Leave one out."
                )
            return None
        if not named:
            raise TypeError(
                "Expected `plan` to be a keras_bandmf.TrainingPlan, for example from "
                "`TrainingPlan.calibrate(...)`, or `epsilon` and `delta` in its place, for which "
                f"the first `fit` makes one. Received: plan={plan!r}"
            )
        if epsilon is None or delta is None:
            raise ValueError(
                "Expected both `epsilon` and `delta`, for which the first `fit` makes a plan. "
                f"Received: epsilon={epsilon!r}, delta={delta!r}."
            )
        return cls(epsilon=epsilon, delta=delta, **options)

    def plan_for(
        self,
        *,
        num_examples: int,
        batch_size: int,
        epochs: int | None,
        num_steps: int | None,
        optimizer: keras.optimizers.Optimizer,
        callback: Callable[[CalibrationProgress], object] | None = None,
    ) -> TrainingPlan:
        """Returns the plan that `TrainingPlan.calibrate` finds for this target.

        Formal guarantees: that of `TrainingPlan.calibrate`. Nothing but the arguments is looked at.
        All of them, the number of rows too, are taken as public.

        Args:
            num_examples: N, the number of rows to train on.
            batch_size: The expected number of rows of a step.
            epochs: Passes over the rows. Give this or `num_steps`.
            num_steps: n, the number of steps.
            optimizer: The optimizer that gets the noisy gradients. Where groups are counted as
                known, the noise is made for the momentum, weight decay and schedule of an SGD.
            callback: Called while samples are drawn, or None.

        Returns:
            The plan.

        Raises:
            TypeError: An argument has the wrong type.
            ValueError: A value or a combination cannot be accounted for.
        """
        steps = num_steps
        if steps is None and epochs is not None and 1 <= batch_size <= num_examples:
            steps = epochs * (num_examples // batch_size)
        return TrainingPlan.calibrate(
            num_examples=num_examples,
            batch_size=batch_size,
            epochs=epochs,
            num_steps=num_steps,
            epsilon=self.epsilon,
            delta=self.delta,
            num_bands=self.num_bands,
            sampling=self.sampling,
            max_bands=self.max_bands,
            amplification=self.amplification,
            workload=None if steps is None else self._workload(optimizer, steps),
            callback=callback,
        )

    def _workload(self, optimizer: keras.optimizers.Optimizer, num_steps: int) -> Workload | None:
        """Returns the workload of an SGD whose weights are not plain prefix sums, or None.

        Counting groups as secret chooses the coefficients among those for prefix sums, which gains
        as much.
        """
        secret = resolved_amplification(self.amplification, self.sampling) == "secret_group"
        if secret or num_steps < 1:
            return None
        try:
            workload = workload_from_optimizer(optimizer, num_steps)
        except (TypeError, ValueError):  # such as for Adam
            return None
        constant = isinstance(workload.learning_rates, float)
        plain = constant and not workload.momentum and not workload.weight_decay
        return None if plain else workload

    def get_config(self) -> dict[str, Any]:
        """Returns the fields as values of JSON."""
        return dataclasses.asdict(self)


class PlanOfRun:
    """The plan of a run: given from the start, or made in its first `fit` for a target.

    Formal guarantees: a plan that a run was begun with is never replaced.

    Args:
        plan: The plan, or None.
        target: What it is to reach, where it is not given; None where it is.

    Attributes:
        target: The target, or None.
    """

    def __init__(self, plan: TrainingPlan | None, target: PlanTarget | None = None):
        self._plan = plan
        self.target = target

    @property
    def known(self) -> bool:
        """Whether there is a plan yet."""
        return self._plan is not None

    @property
    def plan(self) -> TrainingPlan:
        """The plan.

        Raises:
            ValueError: If it is not made yet.
        """
        if self._plan is None:
            raise ValueError(
                "This optimizer has no plan yet. Its first `fit` makes one from the number of rows,"
                " the batch size and the epochs. Call `model.fit(x, y, batch_size=..., epochs=...)`"
                " on arrays first, restore a checkpoint of the run, or pass "
                "`plan=TrainingPlan.calibrate(...)` to BandMFOptimizer in place of `epsilon` and "
                f"`delta`. Received: {self.target}"
            )
        return self._plan

    def spent_message(self) -> str:
        """Returns the error message for a step beyond the plan."""
        way_out = "Make a plan with more steps"
        if self.target is not None:
            way_out = (
                "Give a new BandMFOptimizer the `epochs` of all calls of `fit` together (this one "
                "planned those of its first `fit`), or a plan with more steps,"
            )
        return (
            f"The plan has {self.plan.num_steps} steps and all of them are spent. Another step "
            f"would exceed the stated epsilon. {way_out} and train a new model."
        )

    def settle(self, plan: TrainingPlan) -> None:
        """Sets the plan, once.

        Args:
            plan: The plan.

        Raises:
            ValueError: There is another one.
        """
        if self._plan is not None and self._plan != plan:
            raise ValueError(
                "The plan of a run is fixed when it begins. Received: a second plan. Make a new "
                "optimizer."
            )
        self._plan = plan

    @contextlib.contextmanager
    def kept_if(self, began: Callable[[], bool]) -> Iterator[None]:
        """Forgets a plan that a `fit` made and then failed, so that the next one may make its own.

        Args:
            began: Returns whether a run was begun with the plan.

        Yields:
            Nothing; `fit` runs inside.
        """
        known = self.known
        try:
            yield
        finally:
            if not known and not began():
                self._plan = None

    def to_facts(self) -> dict[str, Any] | None:
        """Returns target and plan as JSON values; None for a plan that was given."""
        if self.target is None:
            return None
        return {
            "target": self.target.get_config(),
            "plan": None if self._plan is None else self._plan.to_json(),
        }

    def take_over(self, facts: Any) -> None:
        """Takes the plan of a checkpoint, if there is none yet.

        Args:
            facts: What `to_facts` returned.

        Raises:
            ValueError: The checkpoint has no such plan, or one for another target.
        """
        if self.known:
            return
        own = None if self.target is None else self.target.get_config()
        if not isinstance(facts, dict) or facts.get("target") != own or not facts.get("plan"):
            raise ValueError(
                "Expected a checkpoint of an optimizer that made its plan for the same target. "
                f"Received: an optimizer for {own}, and a checkpoint for "
                f"{facts.get('target') if isinstance(facts, dict) else 'a plan that was given'}. "
                "Make the optimizer with the arguments it had, or with the plan of that run."
            )
        self.settle(TrainingPlan.from_json(facts["plan"]))
