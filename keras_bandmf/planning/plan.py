"""TrainingPlan: the one frozen record that strategy, sampler, noise and accounting come from."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import os
from collections.abc import Callable
from typing import Any, Literal

import keras

from keras_bandmf import strategies
from keras_bandmf._html import facts
from keras_bandmf.accounting.accountant import checked_delta
from keras_bandmf.accounting.amplification.certificate import Certificate
from keras_bandmf.planning import band_choice
from keras_bandmf.planning.arguments import (
    KnownStrategy,
    NumBands,
    PlanArguments,
    StrategyName,
    check_strategy,
    checked_noise,
)
from keras_bandmf.planning.calibration import Amplification, kept_run
from keras_bandmf.planning.plan_accounting import PlanAccounting
from keras_bandmf.planning.plan_json import plan_arguments, plan_document
from keras_bandmf.planning.plan_table import plan_facts, plan_table
from keras_bandmf.planning.progress import CalibrationProgress
from keras_bandmf.planning.secret_group import check_certificate
from keras_bandmf.planning.units import ROW, check_unit_ids, checked_unit
from keras_bandmf.sampling import PrivateBatches
from keras_bandmf.sampling.laws import Adjacency, SamplingName
from keras_bandmf.sampling.schedule import Schedule


@dataclasses.dataclass(frozen=True, init=False, eq=False)
class TrainingPlan(PlanAccounting):
    """A private training run, fixed before it starts.

    A plan is immutable, goes through JSON without a change of a single bit (`to_json`,
    `from_json`), and prints as a table. It holds no data, no key and no model. `calibrate` finds
    the plan for a target epsilon; the constructor makes one for a given noise multiplier.

    Formal guarantees: training that draws its batches by `batches`, clips every example's
    gradient to norm zeta, adds noise correlated by `strategy` of standard deviation
    `noise_stddev(zeta)` to their sum, and stops after at most `num_steps` updates releases
    weights that are (`epsilon()`, `delta`)-differentially private under `adjacency`, for one row
    of the training data, or one `unit` with all its rows. `num_examples` and everything else in the
    plan is public.

    Attributes:
        num_examples: N, the number of rows of the training data, or of units; a public constant.
        batch_size: The number of rows of a step: see `Schedule`.
        num_steps: n, the number of steps; it is set even if `epochs` was given.
        noise_multiplier: sigma.
        delta: The delta of the guarantee.
        sampling: "cyclic_poisson", "random_allocation" or "fixed_order".
        strategy: The strategy; always an object, even if a name was given.
        max_participations: k of random allocation; declared for data that the user feeds; or None.
        min_separation: Declared for data that the user feeds, or None.
        certificate: What was certified while counting the steps of every example as secret, or
            None. See `calibrate(amplification=...)`.
        unit: What the guarantee protects, and what is counted: "example" is a row of the data;
            any other word, such as "user", is a unit to which `batches(unit=...)` maps the rows.
        schedule: Who takes part when: the one record that both the sampler and the accountant are
            given.

    Example:
        >>> import keras_bandmf as bandmf
        >>> plan = bandmf.TrainingPlan(
        ...     num_examples=60_000, batch_size=600, epochs=10, num_bands=4,
        ...     noise_multiplier=2.0, delta=1e-6,
        ... )
        >>> plan.num_steps, plan.sampling_probability, plan.adjacency
        (1000, 0.04, 'add-or-remove-one')
        >>> 1.5 < plan.epsilon() < 1.7
        True
        >>> bandmf.TrainingPlan.from_json(plan.to_json()) == plan
        True
    """

    num_examples: int
    batch_size: int
    num_steps: int
    noise_multiplier: float
    delta: float
    sampling: SamplingName
    strategy: KnownStrategy
    max_participations: int | None
    min_separation: int | None
    certificate: Certificate | None
    unit: str
    # Not an argument, and not in the JSON: made from the fields above.
    schedule: Schedule = dataclasses.field(init=False, repr=False)

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
        strategy: StrategyName | KnownStrategy = "toeplitz",
        sampling: SamplingName = "cyclic_poisson",
        max_participations: int | None = None,
        min_separation: int | None = None,
        workload: strategies.Workload | keras.optimizers.SGD | None = None,
        certificate: Certificate | None = None,
        unit: str = ROW,
    ):
        """Makes a plan with a given noise multiplier; `calibrate` finds one for a given epsilon.

        Args:
            num_examples: N, the number of rows of the training data, at least 1.
            batch_size: The expected number of rows of a step, in [1, num_examples].
            noise_multiplier: sigma, at least 0. With 0 nothing is private, and the statement says
                so.
            delta: In (0, 1); use a value below 1 / num_examples.
            num_steps: n, the number of steps. Give this or `epochs`.
            epochs: Passes over the data, an integer.
            num_bands: b, the number of bands; 1 is DP-SGD. Leave it out for a strategy object.
            strategy: "toeplitz", "banded", or a strategy object.
            sampling: "cyclic_poisson", "random_allocation" or "fixed_order".
            max_participations: Random allocation: the number of participations of every row;
                `epochs` if left out. Fixed order: the largest number of participations of a row,
                declared for data that the user feeds.
            min_separation: Fixed order only: the fewest steps between two of them, declared, too.
            workload: The quantity whose error the strategy minimizes: a `strategies.Workload`, or
                that of the `keras.optimizers.SGD` to train with. None is prefix sums, or whatever
                a strategy object was optimized for.
            certificate: What `calibrate` found for a plan of these very values. It is computed
                again before any epsilon is taken from it.
            unit: What is counted and protected: "example", a row, or another noun such as "user".
                Then `num_examples` and `batch_size` count users, and `batches` needs their ids.

        Raises:
            TypeError: An argument has the wrong type.
            ValueError: A value or a combination cannot be accounted for.
        """
        choices: dict[str, object] = {"num_bands": num_bands, "sampling": sampling}
        for name, value in choices.items():
            if isinstance(value, str) and value == "auto":
                raise ValueError(
                    f"`{name}='auto'` depends on a target epsilon. Received: {name}='auto', "
                    f"noise_multiplier={noise_multiplier!r}. Use "
                    f"`TrainingPlan.calibrate(epsilon=...)` or choose `{name}`."
                )
        arguments = PlanArguments.resolve(
            num_examples=num_examples,
            batch_size=batch_size,
            num_steps=num_steps,
            epochs=epochs,
            num_bands=num_bands,
            strategy=strategy,
            workload=workload,
            max_participations=max_participations,
            min_separation=min_separation,
        )
        bands = arguments.bands()
        schedule = arguments.schedule(sampling, bands)
        sigma, delta = checked_noise(noise_multiplier), checked_delta(delta)
        # After all checks, because the search takes time.
        _set_fields(self, schedule, sigma, delta, arguments.best_strategy(bands), certificate, unit)

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
        num_bands: NumBands = "auto",
        strategy: StrategyName | KnownStrategy = "toeplitz",
        sampling: SamplingName | Literal["auto"] = "cyclic_poisson",
        max_bands: int = band_choice.DEFAULT_MAX_BANDS,
        max_participations: int | None = None,
        min_separation: int | None = None,
        workload: strategies.Workload | keras.optimizers.SGD | None = None,
        amplification: Amplification = "auto",
        callback: Callable[[CalibrationProgress], object] | None = None,
        cache_dir: str | os.PathLike[str] | None = None,
        unit: str = ROW,
    ) -> TrainingPlan:
        """Finds the plan of lowest expected error that satisfies (epsilon, delta)-DP.

        Formal guarantees: the plan's `epsilon()` is at most `epsilon`, at the very noise multiplier
        chosen, by the accounting that later reports it. Only public values are looked at.

        Args:
            num_examples: N, the number of rows of the training data.
            batch_size: The expected number of rows of a step.
            epsilon: The target, from 10^-6 to 10^6.
            delta: In (0, 1); use a value below 1 / num_examples.
            epochs: Passes over the data, an integer. Give this or `num_steps`.
            num_steps: n, the number of steps.
            num_bands: b. "auto" takes the number with the lowest expected RMSE, up to `max_bands`.
            strategy: "toeplitz", "banded", or a strategy object (with its number of bands).
            sampling: "cyclic_poisson", "random_allocation", "fixed_order", or "auto" for the one of
                lowest expected RMSE (random allocation only with amplification="secret_group").
                `adjacency` then says which relation the guarantee is about.
            max_bands: The largest number of bands that "auto" considers. The noise keeps
                num_bands - 1 copies of the model; `keras_bandmf.max_bands_for_memory` says how
                many fit in a given memory.
            max_participations: As in the constructor.
            min_separation: Fixed order only, in steps: declared for data that the user feeds.
            workload: As in the constructor. With `num_bands="auto"`, candidates are compared by
                their coefficients for prefix sums (with curvatures, for a constant learning rate);
                the chosen one is then optimized for the workload if `n * b**2`, times the number
                of curvatures, is at most 2e7. For larger problems pass `num_bands` to force that
                optimization.
            amplification: How the secrecy of the sampler is counted. "known_group" gives the group
                of each example away to the adversary, and its steps under random allocation.
                "secret_group" does not, and needs less noise for the same epsilon. Its epsilon is
                an upper confidence bound from samples, false with probability at most
                `delta / 1000`, and takes some tens of seconds. See docs/amplification.md. "auto"
                is "secret_group" under random allocation, which rests on it, else "known_group".
            callback: Called while samples are drawn; `keras_bandmf.ProgressBar()` shows them.
            cache_dir: Your own directory of results with secret groups. None writes no files.
            unit: As in the constructor.

        Returns:
            The plan.

        Raises:
            TypeError: An argument has the wrong type.
            ValueError: A value or a combination cannot be accounted for.

        Example:
            >>> import keras_bandmf as bandmf
            >>> plan = bandmf.TrainingPlan.calibrate(
            ...     num_examples=20_000, batch_size=100, epochs=2, epsilon=2.0, delta=1e-6,
            ...     num_bands=4,
            ... )
            >>> 1.99 < plan.epsilon() <= 2.0
            True
        """
        arguments = PlanArguments.resolve(
            num_examples=num_examples,
            batch_size=batch_size,
            num_steps=num_steps,
            epochs=epochs,
            num_bands=num_bands,
            strategy=strategy,
            workload=workload,
            max_participations=max_participations,
            min_separation=min_separation,
        )
        checked_unit(unit, min_separation)  # before the search, which takes time
        run = kept_run(
            arguments,
            epsilon=epsilon,
            delta=delta,
            sampling=sampling,
            max_bands=max_bands,
            amplification=amplification,
            callback=callback,
            cache_dir=cache_dir,
        )
        plan = cls.__new__(cls)
        _set_fields(
            plan,
            run.schedule,
            run.noise_multiplier,
            checked_delta(delta),
            run.strategy,
            run.certificate,
            unit,
        )
        if run.certificate is not None:  # computed just now, or by an earlier call
            plan.__dict__["_secret_group_epsilon"] = run.certificate.epsilon
        return plan

    @property
    def num_bands(self) -> int:
        """The number of bands b: over how many steps noise is correlated; 1 is DP-SGD."""
        return self.strategy.num_bands

    @property
    def workload(self) -> strategies.Workload | None:
        """The workload A that the strategy was optimized for; None is prefix sums."""
        return self.strategy.workload

    @property
    def steps_per_epoch(self) -> int:
        """The number of steps of an epoch, E = `num_examples // batch_size`."""
        return self.schedule.steps_per_epoch

    @property
    def sampling_probability(self) -> float | None:
        """Cyclic Poisson: the rate q = `num_bands * batch_size / num_examples`; else None."""
        return self.schedule.sampling_probability

    @property
    def participations(self) -> int | None:
        """k, the largest number of participations of a row; None where it is random."""
        return self.schedule.participations()

    @property
    def separation(self) -> int | None:
        """Fixed order: the fewest steps between two participations of a row; else None."""
        return self.schedule.separation

    @property
    def declares_participations(self) -> bool:
        """Whether the user feeds the data and declares its order (fixed order only)."""
        return self.min_separation is not None

    @property
    def adjacency(self) -> Adjacency:
        """The adjacency: "zero-out" in a fixed order, else "add-or-remove-one"."""
        return self.schedule.adjacency

    @functools.cached_property
    def expected_rmse(self) -> float:
        """The expected error, sigma * S * sqrt(mean error) / expected participations.

        Its unit is the clip norm; under a workload, it is the clip norm times the learning rate.
        With curvatures, the mean error is their weighted mean. Compare it only with that of another
        plan under the same workload.
        """
        mean_error = self.strategy.loss("mean")
        return band_choice.expected_rmse(self.schedule, self.noise_multiplier, mean_error)

    @functools.cached_property
    def fingerprint(self) -> str:
        """The SHA-256, in hexadecimal, of the plan's JSON in canonical form."""
        canonical = plan_document(self, _names(type(self)), indent=None)
        return hashlib.sha256(canonical.encode()).hexdigest()

    def batches(
        self,
        x: Any,
        y: Any = None,
        sample_weight: Any = None,
        class_weight: dict[int, float] | None = None,
        preprocess: Callable[..., Any] | None = None,
        seed: int | None = None,
        *,
        unit: Any = None,
        rows_per_unit: int = 1,
        augment: Callable[..., Any] | None = None,
        augment_copies: int = 1,
        decode: Callable[[Any], Any] | None = None,
        workers: int | None = None,
    ) -> PrivateBatches:
        """Returns the batches of this plan: the data that the private `fit` takes.

        Formal guarantees: batch t is a function of (plan, run key, t), drawn as the accounting
        assumes; see `PrivateBatches`.

        Args:
            x: An array or tensor with one row for each example, in memory or on disk (memory map,
                HDF5, Zarr); a nested dict, tuple or list of them; a `tf.data.Dataset` of single
                examples; or a source of rows, with `__len__` and `__getitem__`.
            y: Targets, as `x`; None when there are none (or when `x` brings them).
            sample_weight: Non-negative weights, one for each row.
            class_weight: Dict of class number to weight, multiplied into `sample_weight`.
            preprocess: Function of tensors `(x)` or `(x, y)`, applied to rows before sampling.
                Without it, `fit` of a keras_hub task lets the task's preprocessor have them.
            seed: Fixes the sampler's key. For tests only: the run is then not private.
            unit: For a plan with a `unit`: (rows,) ids, whose row it is.
            rows_per_unit: The largest number of rows of a unit that take part in a step.
            augment: Makes a random view of a row in each step: a function `(x, seed)`, or
                `(x, y, seed)`, or a Keras layer. See docs/data.md.
            augment_copies: The number of views of each row. Their mean gradient is clipped once.
            decode: Function of one element of a source; returns `x`, `(x, y)` or
                `(x, y, sample_weight)`.
            workers: How many threads read from disk or from a source; see `PrivateBatches`.

        Returns:
            The batches, which `model.fit` of a privatized model takes as they are.

        Raises:
            TypeError: The data or an argument has the wrong type.
            ValueError: The number of rows is not `num_examples`, or the declared participations
                are stricter than what this sampler does.
            RuntimeError: The first or the last row of a source cannot be read.

        Example:
            >>> import keras_bandmf as bandmf
            >>> import numpy as np
            >>> plan = bandmf.TrainingPlan(
            ...     num_examples=100, batch_size=10, epochs=2, num_bands=2,
            ...     noise_multiplier=1.0, delta=1e-5,
            ... )
            >>> batches = plan.batches(np.zeros((100, 3)), np.zeros(100))
            >>> len(batches), batches.steps_per_epoch
            (20, 10)
        """
        check_unit_ids(self.unit, unit)
        return PrivateBatches(
            x,
            y,
            sample_weight,
            schedule=self.schedule,
            plan_fingerprint=self.fingerprint,
            unit=unit,
            rows_per_unit=rows_per_unit,
            augment=augment,
            augment_copies=augment_copies,
            class_weight=class_weight,
            preprocess=preprocess,
            seed=seed,
            decode=decode,
            workers=workers,
        )

    def to_json(self) -> str:
        """Returns the plan as JSON, exact to the last bit.

        Returns:
            JSON that includes the strategy, and no key or seed.

        Example:
            >>> import json
            >>> import keras_bandmf as bandmf
            >>> plan = bandmf.TrainingPlan(
            ...     num_examples=1_000, batch_size=50, epochs=3, num_bands=4,
            ...     noise_multiplier=1.5, delta=1e-5,
            ... )
            >>> json.loads(plan.to_json())["num_steps"]
            60
        """
        return plan_document(self, _names(type(self)), indent=2)

    @classmethod
    def from_json(cls, text: str) -> TrainingPlan:
        """Reads what `to_json` wrote; the result equals the original.

        Args:
            text: JSON.

        Returns:
            The plan, with the fingerprint of the original.

        Raises:
            TypeError: `text` is not a string.
            ValueError: The format, the version or the strategy class is unknown, fields are
                missing or unknown, or the values make no plan.

        Example:
            >>> import keras_bandmf as bandmf
            >>> plan = bandmf.TrainingPlan(
            ...     num_examples=1_000, batch_size=50, epochs=3, num_bands=4,
            ...     noise_multiplier=1.5, delta=1e-5,
            ... )
            >>> bandmf.TrainingPlan.from_json(plan.to_json()).fingerprint == plan.fingerprint
            True
        """
        return cls(**plan_arguments(text, _names(cls)))

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, TrainingPlan):
            return NotImplemented
        return self.fingerprint == other.fingerprint

    def __hash__(self) -> int:
        return hash(self.fingerprint)

    def __str__(self) -> str:
        """The plan as a table."""
        return plan_table(self)

    def _repr_html_(self) -> str:
        return facts("TrainingPlan", plan_facts(self))


def _set_fields(
    plan: TrainingPlan,
    schedule: Schedule,
    noise_multiplier: float,
    delta: float,
    strategy: KnownStrategy,
    certificate: Certificate | None,
    unit: str,
) -> None:
    """Sets all fields of a new plan: the only place where they are set."""
    check_strategy(strategy, schedule)
    object.__setattr__(plan, "unit", checked_unit(unit, schedule.min_separation))
    for field in dataclasses.fields(schedule):
        if field.name in _names(type(plan)):  # the rest is that of the strategy: just checked
            object.__setattr__(plan, field.name, getattr(schedule, field.name))
    object.__setattr__(plan, "noise_multiplier", noise_multiplier)
    object.__setattr__(plan, "delta", delta)
    object.__setattr__(plan, "strategy", strategy)
    if certificate is not None:
        check_certificate(schedule, noise_multiplier, delta, certificate)
    object.__setattr__(plan, "certificate", certificate)
    object.__setattr__(plan, "schedule", schedule)


def _names(cls: type[TrainingPlan]) -> list[str]:
    """Returns the names of the fields of a plan's JSON, in their order."""
    return [field.name for field in dataclasses.fields(cls) if field.init]
