"""What a private model did, and the statement that follows from it."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator, Sequence

from keras_bandmf.callbacks import steps_done
from keras_bandmf.optimizers import BandMFOptimizer
from keras_bandmf.sampling import PrivateBatches
from keras_bandmf.statement import Statement


@dataclasses.dataclass(frozen=True)
class _Fit:
    """One call of `fit`."""

    source: str
    first_step: int
    last_step: int
    requested_step: int
    monitored: tuple[str, ...]
    seeded_batches: bool


class RunRecord:
    """The calls of `fit` of one model in this process."""

    def __init__(self) -> None:
        self._fits: list[_Fit] = []

    @contextlib.contextmanager
    def fit(
        self,
        optimizer: BandMFOptimizer,
        batches: PrivateBatches | None,
        source: str,
        monitored: Sequence[str],
        epochs: int,
        steps_per_epoch: int | None,
    ) -> Iterator[None]:
        """Records one call of `fit`, also one that fails.

        Args:
            optimizer: the optimizer of the run.
            batches: the batches, or None for data the plan's declaration covers.
            source: what was trained on, in words.
            monitored: callbacks that act on validation metrics.
            epochs: how many epochs were asked for.
            steps_per_epoch: of how many steps, None if unknown.
        """
        first = steps_done(optimizer) if optimizer.built else 0
        requested = optimizer.plan.num_steps
        if steps_per_epoch is not None:
            requested = min(requested, first + epochs * steps_per_epoch)
        try:
            yield
        finally:
            last = steps_done(optimizer) if optimizer.built else 0
            seeded = batches is not None and batches.seed is not None
            self._fits.append(_Fit(source, first, last, requested, tuple(monitored), seeded))

    def statement(self, optimizer: BandMFOptimizer) -> Statement:
        """Returns the statement of what ran.

        Formal guarantees:
            Fewer than all steps of the plan are charged only if one uninterrupted `fit` in this
            process made them all and ended where it was asked to, or was ended by validation
            data; stopping or going on may else have depended on what was seen. A fixed seed of
            noise, sampler or both withdraws the claim.

        Args:
            optimizer: the optimizer of the run.
        """
        steps_run = steps_done(optimizer) if optimizer.built else 0
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
            reason, origin = "the noise was drawn from a fixed seed", "a fixed seed (tests only)"
        elif any(fit.seeded_batches for fit in self._fits):
            reason = "the batches were drawn from a fixed seed"
        if not planned.private:
            reason = planned.not_private_reason
        sources = list(dict.fromkeys(fit.source for fit in self._fits))
        return dataclasses.replace(
            planned,
            executed=True,
            steps_run=steps_run,
            l2_norm_clip=optimizer.l2_norm_clip,
            key_origin=origin if state is not None else "none drawn yet",
            data="; ".join(sources) or ("none in this process" if steps_run else "none yet"),
            caveats=tuple(dict.fromkeys(caveats)),
            private=reason is None,
            not_private_reason=reason,
        )

    def _steps_charged(self, optimizer: BandMFOptimizer, steps_run: int) -> int:
        plan_steps = optimizer.plan.num_steps
        if steps_run in (0, plan_steps):
            return steps_run
        if len(self._fits) != 1 or optimizer.run_state.restores:
            return plan_steps
        (fit,) = self._fits
        whole = fit.first_step == 0 and fit.last_step == steps_run
        ended_as_asked = steps_run == fit.requested_step or fit.monitored
        return steps_run if whole and ended_as_asked else plan_steps

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
