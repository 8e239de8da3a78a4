"""Calibrations with a certificate, kept in files so that nobody waits for one twice."""

from __future__ import annotations

import os
from dataclasses import fields
from typing import Any, NamedTuple

from keras_bandmf import strategies
from keras_bandmf.accounting.accountant import delta_without_noise_share
from keras_bandmf.accounting.amplification.certificate import SEED, Certificate
from keras_bandmf.planning.arguments import KnownStrategy, PlanArguments, check_strategy
from keras_bandmf.planning.secret_group import check_certificate
from keras_bandmf.sampling.laws import SamplingName
from keras_bandmf.sampling.schedule import Schedule
from keras_bandmf.strategies.search.cache import Record, Store

# Must change whenever the same request may give another result, or what is certified or how.
_VERSION = 1


class Kept(NamedTuple):
    """What is kept of a calibration.

    Attributes:
        schedule: With the number of bands that was chosen.
        strategy: The strategy that was chosen.
        certificate: What was certified for both.
    """

    schedule: Schedule
    strategy: KnownStrategy
    certificate: Certificate


class KeptCalibration:
    """The file of one calibration, in a directory that results of strategies share.

    Formal guarantees: the name of the file is the SHA-256 of all that the result depends on, with
    the version of the algorithm, and the file ends with the SHA-256 of its content. One that is
    damaged, of another request or version, or of another make is not used. Of a file that is used,
    everything that can be checked at once is checked again: that the certificate is about the
    target epsilon, about no more than the target delta, and about sampling in secret; that the
    strategy has the steps and bands of the schedule and no column above norm 1; and the schedule
    is made anew from the arguments. Not computed again are the samples, which is what takes long.
    So the directory must be one that nobody else can write to: whoever writes to it could write a
    false certificate with all its checksums, as they could edit this library. Plans that come from
    somebody else come as JSON, whose certificates are computed again.

    Args:
        cache_dir: The directory. It is made if it does not exist.
        arguments: The resolved arguments of the plan.
        epsilon: The target.
        delta: The target.
        sampling: The name of the sampling law, or "auto".
        max_bands: The largest number of bands to consider.
        amplification: How the secrecy of the sampler is counted.

    Raises:
        TypeError: If `cache_dir` is not a path.
        OSError: If the directory cannot be made.
    """

    def __init__(
        self,
        cache_dir: str | os.PathLike[str],
        arguments: PlanArguments,
        *,
        epsilon: float,
        delta: float,
        sampling: str,
        max_bands: int,
        amplification: str,
    ):
        self._arguments, self._epsilon, self._delta = arguments, epsilon, delta
        strategy, workload = arguments.strategy, arguments.workload
        request: dict[str, Any] = {
            "class_name": "TrainingPlan.calibrate",
            "algorithm": [_VERSION, SEED],
            # All of them, those too that `PlanArguments` gets later.
            **{field.name: getattr(arguments, field.name) for field in fields(arguments)},
            "strategy": strategy if isinstance(strategy, str) else strategy.get_config(),
            "workload": None if workload is None else workload.get_config(),
            "epsilon": epsilon,
            "delta": delta,
            "sampling": sampling,
            "max_bands": max_bands,
            "amplification": amplification,
        }
        self._store = Store(cache_dir, request)

    def load(self) -> Kept | None:
        """Returns what was kept, or None if there is nothing that can be used.

        Warns:
            RuntimeWarning: If the file is cut short, damaged or was edited.
        """
        record = self._store.load("result")
        if record is None:
            return None
        try:
            return self._checked(record.fields)
        except (ValueError, TypeError, KeyError):  # of another make
            return None

    def save(self, kept: Kept) -> None:
        """Writes a calibration.

        Warns:
            RuntimeWarning: If it cannot be written.
        """
        found = {
            "sampling": kept.schedule.sampling,
            "strategy": kept.strategy.get_config(),
            "certificate": kept.certificate.get_config(),
        }
        self._store.save("result", Record(found, {}))

    def _checked(self, found: dict[str, Any]) -> Kept:
        sampling: SamplingName = found["sampling"]
        strategy: Any = strategies.from_config(found["strategy"])
        certificate = Certificate.from_config(found["certificate"])
        schedule = self._arguments.schedule(sampling, strategy.num_bands)
        check_strategy(strategy, schedule)
        check_certificate(schedule, certificate.sigma, self._delta, certificate)
        delta = delta_without_noise_share(self._delta)
        if (certificate.epsilon, certificate.delta) != (self._epsilon, delta):
            raise ValueError("The certificate is about another epsilon or delta.")
        if not certificate.bound <= certificate.delta:
            raise ValueError("The certificate is about a bound above its delta.")
        return Kept(schedule, strategy, certificate)
