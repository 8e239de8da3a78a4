"""TrainingPlan: the one frozen record that strategy, sampler, noise and accounting come from."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
from typing import Any

import dp_accounting

from keras_bandmf import strategies
from keras_bandmf._checks import checked_float
from keras_bandmf.accounting.accountant import Schedule, checked_delta, epsilon_of
from keras_bandmf.planning import band_choice
from keras_bandmf.planning.arguments import (
    check_strategy,
    resolve_bands,
    resolve_steps,
    resolve_strategy,
    resolve_workload,
)
from keras_bandmf.planning.calibration import calibrated_arguments
from keras_bandmf.planning.documents import read_document, write_document
from keras_bandmf.planning.plan_report import planned_statement
from keras_bandmf.planning.plan_table import plan_table
from keras_bandmf.planning.statement import Statement
from keras_bandmf.sampling import PrivateBatches

_FORMAT = "keras_bandmf.TrainingPlan"
_VERSION = 1


@dataclasses.dataclass(frozen=True, init=False, eq=False)
class TrainingPlan:
    """A private training run, fixed before it starts: immutable, in JSON exact, printed as a table.

    Formal guarantees: training that draws its batches by `batches`, clips every example's
    gradient to norm zeta, adds noise correlated by `strategy` of standard deviation
    `noise_stddev(zeta)` to their sum, and stops after at most `num_steps` updates releases
    weights that are (`epsilon()`, `delta`)-differentially private under `adjacency`, for one row
    of the training data. `num_examples` and everything else in the plan is public.

    Attributes: as the arguments; `strategy` is the object, `num_steps` is there either way.
    """

    num_examples: int
    batch_size: int
    num_steps: int
    noise_multiplier: float
    delta: float
    sampling: str
    strategy: Any
    max_participations: int | None
    min_separation: int | None

    def __init__(
        self,
        *,
        num_examples: int,
        batch_size: int,
        noise_multiplier: float,
        delta: float,
        num_steps: int | None = None,
        epochs: int | None = None,
        num_bands: int | None = None,
        strategy: Any = "toeplitz",
        sampling: str = "cyclic_poisson",
        max_participations: int | None = None,
        min_separation: int | None = None,
        workload: Any = None,
    ):
        """A plan with a given noise multiplier; `calibrate` finds one for a given epsilon.

        Args:
            num_examples: N >= 1.
            batch_size: in [1, num_examples].
            noise_multiplier: sigma >= 0; 0 is not private, and the statement says so.
            delta: in (0, 1).
            num_steps: n; give this or `epochs`.
            epochs: passes over the data, an integer.
            num_bands: b, needed with a strategy's name; 1 is DP-SGD.
            strategy: "toeplitz", "banded", or a strategy object.
            sampling: "cyclic_poisson" or "fixed_order".
            max_participations: fixed order only, declared for foreign data.
            min_separation: fixed order only, declared for foreign data.
            workload: what the noise is to disturb least: a `strategies.Workload`, the
                `keras.optimizers.SGD` to train with, or None: prefix sums, or what a strategy
                object was optimised for.

        Raises:
            TypeError: for a wrong type.
            ValueError: for a value or a combination that cannot be accounted for.
        """
        num_steps = resolve_steps(num_examples, batch_size, num_steps, epochs)
        for name, value in (("num_bands", num_bands), ("sampling", sampling)):
            if isinstance(value, str) and value == "auto":
                raise ValueError(
                    f"`{name}='auto'` depends on a target epsilon. Received: {name}='auto', "
                    f"noise_multiplier={noise_multiplier!r}. Use "
                    f"`TrainingPlan.calibrate(epsilon=...)` or choose `{name}`."
                )
        bands = resolve_bands(num_bands, strategy)
        schedule = Schedule(
            sampling, num_examples, batch_size, num_steps, bands, max_participations, min_separation
        )
        object.__setattr__(self, "_schedule", schedule)
        for field in dataclasses.fields(schedule):
            if field.name != "num_bands":
                object.__setattr__(self, field.name, getattr(schedule, field.name))
        sigma = checked_float(
            "noise_multiplier",
            noise_multiplier,
            minimum=0.0,
            hint="Use `TrainingPlan.calibrate(epsilon=...)` to find one.",
        )
        object.__setattr__(self, "noise_multiplier", sigma)
        object.__setattr__(self, "delta", checked_delta(delta))
        workload = resolve_workload(workload, schedule.num_steps)
        strategy = resolve_strategy(strategy, schedule.num_steps, bands, workload)
        check_strategy(strategy, schedule)
        object.__setattr__(self, "strategy", strategy)

    @classmethod
    def calibrate(
        cls,
        *,
        num_examples: int,
        batch_size: int,
        epsilon: float,
        delta: float,
        epochs: int | None = None,
        num_steps: int | None = None,
        num_bands: int | str | None = "auto",
        strategy: Any = "toeplitz",
        sampling: str = "cyclic_poisson",
        max_bands: int = band_choice.DEFAULT_MAX_BANDS,
        max_participations: int | None = None,
        min_separation: int | None = None,
        workload: Any = None,
    ) -> TrainingPlan:
        """The plan of least expected error for an (epsilon, delta).

        Formal guarantees: the plan's `epsilon()` is at most `epsilon`, evaluated at the very
        noise multiplier chosen, by the accounting that later reports it. Only public values are
        looked at.

        Args:
            num_examples: N.
            batch_size: expected examples a step.
            epsilon: the target, above 0.
            delta: in (0, 1); below 1 / num_examples.
            epochs: passes over the data; give this or `num_steps`.
            num_steps: n.
            num_bands: "auto" takes the number with the lowest expected RMSE, up to `max_bands`.
            strategy: "toeplitz", "banded", or a strategy object (with its number of bands).
            sampling: "cyclic_poisson", "fixed_order", or "auto" for the one of lower expected
                RMSE: `adjacency` then says which relation the guarantee is about.
            max_bands: cap of "auto"; the noise keeps num_bands - 1 copies of the model, and
                `keras_bandmf.max_bands` says how many fit into a memory.
            max_participations: fixed order only, declared for foreign data.
            min_separation: fixed order only, declared for foreign data.
            workload: as of a plan. With num_bands="auto" bands are compared by coefficients for
                prefix sums, and those of the chosen number are searched for under the workload
                up to n b^2 = 2 * 10^7; beyond, they stay (name `num_bands` for the search).

        Returns:
            The plan.

        Raises:
            TypeError: for a wrong type.
            ValueError: for a value or combination that cannot be accounted for.
        """
        return cls(
            **calibrated_arguments(
                num_examples=num_examples,
                batch_size=batch_size,
                epsilon=epsilon,
                delta=delta,
                epochs=epochs,
                num_steps=num_steps,
                num_bands=num_bands,
                strategy=strategy,
                sampling=sampling,
                max_bands=max_bands,
                max_participations=max_participations,
                min_separation=min_separation,
                workload=workload,
            )
        )

    @property
    def num_bands(self) -> int:
        """b: how many steps a gradient's noise is spread over; 1 is DP-SGD."""
        return self.strategy.num_bands

    @property
    def workload(self) -> strategies.Workload | None:
        """A, what the strategy was optimised for; None is prefix sums."""
        return self.strategy.workload

    @property
    def steps_per_epoch(self) -> int:
        """E = num_examples // batch_size."""
        return self._schedule.steps_per_epoch

    @property
    def sampling_probability(self) -> float | None:
        """q = num_bands * batch_size / num_examples; None in a fixed order."""
        return self._schedule.sampling_probability

    @property
    def participations(self) -> int | None:
        """Fixed order: k, the most often an example takes part; None under cyclic Poisson."""
        return self._schedule.participations() if self.sampling == "fixed_order" else None

    @property
    def separation(self) -> int | None:
        """Fixed order: steps between two participations of an example; else None."""
        return self._schedule.separation if self.sampling == "fixed_order" else None

    @property
    def declares_participations(self) -> bool:
        """Whether the user vouches for the order of foreign data (fixed order only)."""
        return self.max_participations is not None

    @property
    def adjacency(self) -> str:
        """ "add-or-remove-one" (cyclic Poisson) or "zero-out" (fixed order)."""
        return self._schedule.adjacency

    @functools.cached_property
    def sensitivity(self) -> float:
        """S: largest column norm, times sqrt(participations) in a fixed order."""
        return self._schedule.sensitivity * self.strategy.sensitivity()

    @functools.cached_property
    def expected_rmse(self) -> float:
        """sigma * S * sqrt(mean error) / expected participations, in units of the clip norm.

        Under a workload, in units of the clip norm times the learning rate: compare it with that
        of another plan under the same workload.
        """
        mean_error = self.strategy.loss("mean")
        return band_choice.expected_rmse(self._schedule, self.noise_multiplier, mean_error)

    @functools.cached_property
    def fingerprint(self) -> str:
        """SHA-256, in hex, of the canonical JSON."""
        canonical = write_document(_FORMAT, _VERSION, self._fields(), indent=None)
        return hashlib.sha256(canonical.encode()).hexdigest()

    def noise_stddev(self, l2_norm_clip: float) -> float:
        """The standard deviation of z, the independent noise before correlation.

        Args:
            l2_norm_clip: zeta, the norm each example's gradient is clipped to.

        Returns:
            sigma * S * zeta.
        """
        clip = checked_float("l2_norm_clip", l2_norm_clip, above=0.0)
        return self.noise_multiplier * self.sensitivity * clip

    def dp_event(self, steps: int | None = None) -> dp_accounting.DpEvent:
        """The `dp_accounting` event of the first `steps` steps; None charges the whole run.

        Formal guarantees: as `Schedule.dp_event`: `steps` must have been fixed in advance, or
        the stop must not have looked at anything private.
        """
        return self._schedule.dp_event(self.noise_multiplier, steps)

    def epsilon(self, steps: int | None = None) -> float:
        """Epsilon at `delta` of the first `steps` steps; None charges the whole run.

        Formal guarantees: an upper bound, valid for a number of steps that was fixed in advance
        or chosen without looking at anything private; otherwise the whole run is to be charged.

        Args:
            steps: t in [0, num_steps].

        Returns:
            Epsilon; `math.inf` without noise.
        """
        if steps is None or steps == self.num_steps:
            return self._whole_epsilon
        return epsilon_of(self.dp_event(steps), self.delta)

    @functools.cached_property
    def _whole_epsilon(self) -> float:
        return epsilon_of(self.dp_event(), self.delta)

    def statement(self, steps: int | None = None) -> Statement:
        """What the plan would guarantee: headed "planned, not executed".

        Formal guarantees: as `epsilon`: charging fewer than all steps is valid only if their
        number was fixed in advance.

        Args:
            steps: t in [0, num_steps]; None is all.

        Returns:
            A `Statement`; `dataclasses.replace` makes that of a run from it.
        """
        return planned_statement(
            self._schedule,
            strategy_name=type(self.strategy).__name__,
            noise_multiplier=self.noise_multiplier,
            epsilon=self.epsilon(steps),
            delta=self.delta,
            steps=steps,
            fingerprint=self.fingerprint,
        )

    def batches(
        self,
        x: Any,
        y: Any = None,
        sample_weight: Any = None,
        class_weight: Any = None,
        preprocess: Any = None,
        seed: int | None = None,
    ) -> PrivateBatches:
        """The batches of this plan: the only data the private `fit` takes.

        Formal guarantees: batch t is a function of (plan, run key, t), drawn as the accounting
        assumes; see `PrivateBatches`.

        Args:
            x: arrays, a structure of arrays, or a `tf.data.Dataset` of single examples.
            y: targets.
            sample_weight: a weight per example.
            class_weight: class to weight.
            preprocess: applied to examples before sampling.
            seed: for tests only: the run is then not private.

        Raises:
            ValueError: if the declared participations are stricter than this sampler's.
        """
        self._schedule.check_own_batches()
        return PrivateBatches(
            x,
            y,
            sample_weight,
            num_examples=self.num_examples,
            batch_size=self.batch_size,
            num_steps=self.num_steps,
            num_bands=self.num_bands,
            sampling=self.sampling,
            plan_fingerprint=self.fingerprint,
            class_weight=class_weight,
            preprocess=preprocess,
            seed=seed,
        )

    def _fields(self) -> dict[str, Any]:
        fields = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return {**fields, "strategy": self.strategy.get_config()}

    def to_json(self) -> str:
        """The plan as JSON: strategy included, exact to the last bit, no key or seed in it."""
        return write_document(_FORMAT, _VERSION, self._fields(), indent=2)

    @classmethod
    def from_json(cls, text: str) -> TrainingPlan:
        """Reads what `to_json` wrote; the result equals the original.

        Args:
            text: JSON.

        Returns:
            The plan, with the fingerprint of the original.

        Raises:
            ValueError: for another format or version, an unknown strategy class, missing or
                unknown fields, or values that make no plan.
        """
        names = {field.name for field in dataclasses.fields(cls)}
        fields = read_document(text, _FORMAT, _VERSION, names)
        fields["strategy"] = strategies.from_config(fields["strategy"])
        return cls(**fields)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, TrainingPlan):
            return NotImplemented
        return self.fingerprint == other.fingerprint

    def __hash__(self) -> int:
        return hash(self.fingerprint)

    def __str__(self) -> str:
        """The plan as a table."""
        return plan_table(self, self._schedule)
