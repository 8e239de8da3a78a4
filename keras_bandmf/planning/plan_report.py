"""The statement of a plan, headed "planned, not executed"."""

from __future__ import annotations

from keras_bandmf._printed import rounded_down, rounded_up
from keras_bandmf.accounting.accountant import (
    accountant_name,
    delta_without_noise_share,
    epsilon_of,
)
from keras_bandmf.accounting.amplification.certificate import Certificate
from keras_bandmf.accounting.composition import event_parts
from keras_bandmf.planning.attacker import with_attacker
from keras_bandmf.planning.statement import Statement
from keras_bandmf.planning.tf_privacy import tf_privacy_epsilons
from keras_bandmf.planning.units import ROW, not_covered, sampling_in_words, unit_in_words
from keras_bandmf.sampling.schedule import Schedule

#: How the caveat of a plan with a certificate begins.
SECRET_GROUPS = "epsilon counts the random group of each example as secret"


def planned_statement(
    schedule: Schedule,
    *,
    strategy: str,
    noise_multiplier: float,
    epsilon: float,
    delta: float,
    steps: int | None,
    fingerprint: str,
    certificate: Certificate | None = None,
    unit: str = ROW,
) -> Statement:
    """Returns what a schedule would guarantee if it ran with this noise.

    Formal guarantees: charging fewer than all steps is valid only if their number was fixed in
    advance, or if the decision to stop looked at nothing private; the statement says so.

    Args:
        schedule: The schedule of the run.
        strategy: The strategy in words.
        noise_multiplier: sigma.
        epsilon: The epsilon that was computed for `steps`.
        delta: In (0, 1).
        steps: The number of steps to charge; None charges all of them.
        fingerprint: The fingerprint of the plan.
        certificate: That of the plan, or None.
        unit: The unit of the plan.

    Returns:
        The statement; `dataclasses.replace` makes that of a run from it.
    """
    charged = schedule.num_steps if steps is None else steps
    bands = schedule.num_bands
    noise = "independent" if bands == 1 else "correlated"
    event = schedule.dp_event(noise_multiplier, charged)
    others: dict[str, float] = {}
    if schedule.sampling == "cyclic_poisson" and bands == 1 and charged > 0:
        others = tf_privacy_epsilons(
            num_examples=schedule.num_examples,
            batch_size=schedule.batch_size,
            num_steps=charged,
            noise_multiplier=noise_multiplier,
            delta=delta_without_noise_share(delta),  # as for our own epsilon
        )
    accountant, caveats = accountant_name(event), _caveats(schedule, delta, charged, unit)
    if certificate is not None and charged:
        known = epsilon_of(event, delta)
        steps_secret = schedule.law.fixes_participations
        if epsilon < known:
            accountant = "Monte Carlo (secret groups)"
            others["known group and steps" if steps_secret else "known group"] = known
            caveats += (_of_certificate(certificate, steps_secret),)
    secret = accountant.startswith("Monte Carlo")
    planned = Statement(
        executed=False,
        mechanism=f"per-example clipping, {noise} Gaussian noise ({strategy}), then a Keras "
        "optimizer",
        epsilon=epsilon,
        delta=delta,
        adjacency=schedule.adjacency,
        unit=unit_in_words(unit),
        not_covered=not_covered(unit),
        sampling=sampling_in_words(schedule, unit),
        steps_charged=charged,
        steps_run=0,
        num_steps=schedule.num_steps,
        num_examples=schedule.num_examples,
        batch_size=max(1, round(schedule.expected_batch_size)),
        num_bands=bands,
        noise_multiplier=noise_multiplier,
        accountant=accountant,
        other_accountants=others,
        data=_data(schedule),
        caveats=caveats,
        plan_fingerprint=fingerprint,
        events=event_parts(event),
        accounted_delta=None if secret else delta_without_noise_share(delta),
    )
    return with_attacker(planned)


def _data(schedule: Schedule) -> str:
    if schedule.min_separation is None:
        return "none yet"
    return (
        f"declared by the user, not checked: at most {schedule.max_participations} "
        f"participations of an example, at least {schedule.min_separation} steps apart"
    )


def _of_certificate(certificate: Certificate, steps_secret: bool) -> str:
    steps = ", and its steps" if steps_secret else ""
    return (
        f"{SECRET_GROUPS}{steps}. It is an upper confidence bound "
        f"from {max(certificate.samples)} samples, computed again from its public seed, and "
        f"is false with probability at most {rounded_up(certificate.failure, 2)} over their random "
        "words"
    )


def _caveats(schedule: Schedule, delta: float, charged: int, unit: str) -> tuple[str, ...]:
    caveats = []
    if delta > 1 / schedule.num_examples:
        caveats.append(
            f"delta = {rounded_up(delta, 3)} exceeds 1 / num_examples = "
            f"{rounded_down(1 / schedule.num_examples, 3)}: "
            f"even publishing one random {'row' if unit == ROW else unit} in full would satisfy "
            "this guarantee"
        )
    # A strategy without bands is charged in full at its first step.
    if charged < schedule.num_steps and schedule.strategy_sensitivity is None:
        caveats.append(
            f"charging {charged} of {schedule.num_steps} steps is valid only if this number was "
            "fixed in advance, or if the decision to stop looked at nothing private"
        )
    return tuple(caveats)
