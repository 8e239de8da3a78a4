"""What a private model did, and the statement that follows from it."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator, Sequence

import keras

from keras_bandmf.callbacks import ClippedFraction, unknown_callbacks
from keras_bandmf.optimizers import BandMFOptimizer
from keras_bandmf.statement import Statement


@dataclasses.dataclass(frozen=True)
class _Fit:
    """One call of `fit`."""

    source: str
    first_step: int
    last_step: int
    requested_step: int
    completed: bool
    monitored: tuple[str, ...]
    unknown_callbacks: tuple[str, ...]
    reported_clipping: bool


class RunRecord:
    """The calls of `fit` of one model in this process."""

    def __init__(self) -> None:
        self._fits: list[_Fit] = []
        self._optimizer: BandMFOptimizer | None = None

    def check_optimizer(self, optimizer: BandMFOptimizer) -> None:
        """Refuses a second run on the same weights: its statement would leave out the first.

        Raises:
            ValueError: if steps were made with another optimizer.
        """
        if self._optimizer is not None and self._optimizer is not optimizer:
            raise ValueError(
                "The weights of this model hold an earlier private run, and a second optimizer "
                "would state its own epsilon only. Compile with the optimizer of that run to go "
                "on, or build a fresh model to start anew."
            )

    @contextlib.contextmanager
    def fit(
        self,
        optimizer: BandMFOptimizer,
        source: str,
        callbacks: Sequence[keras.callbacks.Callback],
        monitored: Sequence[str],
        epochs: int,
        steps_per_epoch: int | None,
        reports_clipping: bool = False,
    ) -> Iterator[None]:
        """Records one call of `fit`, also one that fails.

        Args:
            optimizer: the optimizer of the run.
            source: what was trained on, in words.
            callbacks: the callbacks given to `fit`.
            monitored: those of them that act on validation metrics, in words.
            epochs: how many epochs were asked for.
            steps_per_epoch: of how many steps, None if unknown.
            reports_clipping: whether the logs hold the fraction of clipped examples.
        """
        first = optimizer.steps_done
        requested = optimizer.plan.num_steps
        if steps_per_epoch is not None:
            requested = min(requested, first + epochs * steps_per_epoch)
        completed = False
        try:
            yield
            completed = True
        finally:
            last = optimizer.steps_done
            stopped = any(
                isinstance(callback, keras.callbacks.EarlyStopping) and callback.stopped_epoch
                for callback in callbacks
            )
            # EarlyStopping looks at the end of an epoch: within one, something else stopped.
            stopped = stopped and bool(steps_per_epoch) and (last - first) % steps_per_epoch == 0
            completed = completed and (stopped or last == requested)
            unknown = unknown_callbacks(callbacks)
            self._fits.append(
                _Fit(
                    source,
                    first,
                    last,
                    requested,
                    completed,
                    tuple(monitored),
                    tuple(unknown),
                    reports_clipping,
                )
            )
            if last > first:
                self._optimizer = optimizer

    def statement(self, optimizer: BandMFOptimizer) -> Statement:
        """Returns the statement of what ran.

        Formal guarantees:
            Fewer than all steps of the plan are charged only if one uninterrupted `fit` in this
            process made them all and ended where it was asked to, or by an EarlyStopping on
            validation data; stopping or going on may else have depended on what was seen. A fixed
            seed of noise or sampler withdraws the claim.

        Args:
            optimizer: the optimizer of the run.

        Raises:
            ValueError: if the weights hold steps of another optimizer, or of another run.
        """
        self.check_optimizer(optimizer)
        optimizer.check_restored()
        steps_run = optimizer.steps_done
        state = optimizer.run_state if optimizer.built else None
        charged = self._steps_charged(optimizer, steps_run)
        planned = optimizer.plan.statement(charged)
        caveats = [*planned.caveats, *self._caveats(optimizer, steps_run, charged)]
        if optimizer.plan.declares_participations:
            caveats.append(
                "the order of the data was declared by the user, not enforced by this library: "
                f"at most {optimizer.plan.participations} participations of a row, at least "
                f"{optimizer.plan.separation} steps apart"
            )
        reason, origin = None, "the operating system"
        if state is not None and state.seeded:
            reason = "noise or batches were drawn from a fixed seed"
            origin = "a fixed seed (tests only)"
        if not planned.private:
            reason = planned.not_private_reason
        sources = list(dict.fromkeys(fit.source for fit in self._fits))
        carriers = str(state.carriers) if state is not None else ""
        mechanism = f"{planned.mechanism}; {carriers}" if carriers else planned.mechanism
        return dataclasses.replace(
            planned,
            executed=True,
            mechanism=mechanism,
            steps_run=steps_run,
            l2_norm_clip=optimizer.l2_norm_clip,
            clipping=optimizer.clipping.describe(optimizer.l2_norm_clip),
            key_origin=origin if state is not None else "none drawn yet",
            data="; ".join(sources) or ("none in this process" if steps_run else "none yet"),
            caveats=tuple(dict.fromkeys(caveats)),
            private=reason is None,
            not_private_reason=reason,
        )

    def _steps_charged(self, optimizer: BandMFOptimizer, steps_run: int) -> int:
        plan_steps = optimizer.plan.num_steps
        # The optimizer alone may have gone back: the weights still hold what these fits did.
        if not any((steps_run, *(fit.last_step for fit in self._fits))):
            return 0
        if steps_run == plan_steps:
            return plan_steps
        if len(self._fits) != 1 or optimizer.run_state.restores:
            return plan_steps
        (fit,) = self._fits
        whole = fit.first_step == 0 and fit.last_step == steps_run
        return steps_run if whole and fit.completed else plan_steps

    def _caveats(self, optimizer: BandMFOptimizer, steps_run: int, charged: int) -> list[str]:
        caveats = []
        if charged > steps_run:
            caveats.append(
                f"{steps_run} steps ran, but all {charged} are charged: training was interrupted, "
                "resumed or extended, which may have depended on what was seen"
            )
        for monitored in dict.fromkeys(name for fit in self._fits for name in fit.monitored):
            caveats.append(
                f"{monitored} acted on validation data, which must be public or disjoint from the "
                "training data"
            )
        unknown = sorted({name for fit in self._fits for name in fit.unknown_callbacks})
        if unknown:
            caveats.append(
                f"callbacks of the user ran: {', '.join(unknown)}; they must not have acted on "
                "training metrics or data, which are not private"
            )
        if any(fit.reported_clipping for fit in self._fits):
            caveats.append(
                f"the logs hold {ClippedFraction.NAME}, computed without noise: it must be neither "
                "released nor acted on"
            )
        state = optimizer.run_state if optimizer.built else None
        if state is not None and state.restores:
            caveats.append(
                f"restored from a checkpoint {state.restores} times: steps repeated after a "
                "restore are covered only if their first results were never released"
            )
        if state is not None and state.replayed:
            caveats.append(
                "replay=True kept the noise key: results of the repeated steps must never have "
                "been released, for the same noise on two gradients cancels"
            )
        return caveats
