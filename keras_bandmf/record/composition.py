"""One statement of several private runs on the same data."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Sequence
from typing import Any

from keras_bandmf._checks import checked_float
from keras_bandmf.accounting.accountant import delta_without_noise_share
from keras_bandmf.accounting.composition import composed_epsilon, delta_of_ideal_noise
from keras_bandmf.noise.finite import affords_tail
from keras_bandmf.planning.attacker import noise_tail, with_attacker
from keras_bandmf.planning.plan_report import SECRET_GROUPS
from keras_bandmf.planning.statement import Statement

_FIXED_PLANS = (
    "epsilon covers all runs together, provided that their plans and their number were fixed in "
    "advance and not chosen by looking at what an earlier run produced"
)

#: In the caveat of a run that held out rows for validation.
HELD_OUT = "rows out of the training. The guarantee is for the first"
_SAME = {"adjacency": "`sampling` ('cyclic_poisson' or 'fixed_order')", "unit": "`unit`"}


def compose(statements: Sequence[Statement], delta: float | None = None) -> Statement:
    """Returns one statement of several runs on the same data.

    Formal guarantees: epsilon is `composed_epsilon` of all that the runs were charged for, at
    `delta`. The claim is withdrawn if that of one run is, and where epsilon is so large that the
    finite tails of the noise of all runs cost more of delta than was set aside for them. Of plans
    that were not executed, tails are left out: they are known when noise is made.

    Args:
        statements: The statements of the runs, in their order; composed ones are taken apart.
        delta: In (0, 1); None takes that of the last run.

    Returns:
        The statement; for a single run it is that of the run, at `delta`.

    Raises:
        TypeError: `delta` is not a number.
        ValueError: There is no statement, the guarantees are about different neighbors or units,
            or one statement does not say what it was charged for.
    """
    runs = [run for statement in statements for run in (statement.runs or (statement,))]
    if not runs:
        raise ValueError("Expected `statements` to hold at least one run. Received: statements=[]")
    last = runs[-1]
    delta = last.delta if delta is None else checked_float("delta", delta, above=0.0, below=1.0)
    if len(runs) == 1 and delta == last.delta:
        return last
    check_same("adjacency", [run.adjacency for run in runs])
    check_same("unit", [run.unit for run in runs])
    for run in runs:
        if run.steps_charged and not run.events:
            raise ValueError(
                "Expected every statement to say what it was charged for: otherwise it cannot be "
                f"composed. Received: events=() with steps_charged={run.steps_charged}."
            )
    asked = delta_of_ideal_noise([run.delta for run in runs], delta)
    epsilon, accountant = composed_epsilon([e for run in runs for e in run.events], asked)
    caveats = [caveat for run in runs for caveat in run.caveats]
    if any(caveat.startswith(SECRET_GROUPS) for caveat in caveats):
        caveats = [caveat for caveat in caveats if not caveat.startswith(SECRET_GROUPS)]
        caveats.append(
            "epsilon is composed as if the random group of each example was known, and its steps "
            "under random allocation, although plans counted them as secret"
        )
    if len(runs) > 1 and any(HELD_OUT in each for run in runs for each in run.caveats):
        caveats.append(
            "a run held out rows for validation, and callbacks or their user may have acted on "
            "what they said: if another run trained on those rows, the guarantee is not for them"
        )
    if delta > 1 / min(run.num_examples for run in runs):
        caveats.append(f"delta = {delta!r} exceeds 1 / num_examples")
    reasons = [run.not_private_reason for run in runs if not run.private]
    tails = math.fsum(noise_tail(run) for run in runs if run.executed and run.steps_charged)
    if not affords_tail(tails, math.fsum(run.delta for run in runs), epsilon):
        reasons.append(
            "epsilon is so large that the finite tails of the noise cost more than delta allows "
            "(use noise='exact' or more noise)"
        )
    claim: dict[str, Any] = {
        "private": not reasons,
        "not_private_reason": "; ".join(_joined(reasons)) or None,
    }
    if len(runs) == 1:
        whole = dataclasses.replace(
            last,
            **claim,
            epsilon=epsilon,
            delta=delta,
            accounted_delta=delta_without_noise_share(asked),
            accountant=accountant,
            other_accountants={},
            caveats=_joined(caveats),
        )
        return with_attacker(whole, [last])
    whole = dataclasses.replace(
        last,
        accounted_delta=delta_without_noise_share(asked),
        mechanism="; ".join(_joined(run.mechanism for run in runs)),
        epsilon=epsilon,
        delta=delta,
        sampling="; ".join(_joined(run.sampling for run in runs)),
        steps_charged=sum(run.steps_charged for run in runs),
        steps_run=sum(run.steps_run for run in runs),
        num_steps=sum(run.num_steps for run in runs),
        accountant=accountant,
        other_accountants={},
        key_origin="; ".join(_joined(run.key_origin for run in runs)),
        data="; ".join(_joined(run.data for run in runs)),
        caveats=_joined([_FIXED_PLANS, *caveats]),
        **claim,
        noise_tail=None,
        plan_fingerprint=None,
        events=tuple(event for run in runs for event in run.events),
        runs=tuple(runs),
        run_id=None,
    )
    return with_attacker(whole)


def check_same(name: str, values: Iterable[str]) -> None:
    """Refuses runs whose guarantees are not about the same thing.

    Args:
        name: "adjacency" or "unit".
        values: That of each run.

    Raises:
        ValueError: The values differ; the message names them.
    """
    found = _joined(values)
    if len(found) > 1:
        raise ValueError(
            f"Expected runs on the same weights to have the same `{name}`, because they are "
            f"composed. Received: {', '.join(found)}. Plan both with the same "
            f"{_SAME[name]}, or start from weights that no private run has trained."
        )


def _joined(texts: Iterable[str | None]) -> tuple[str, ...]:
    """Returns the texts that there are, each once."""
    return tuple(dict.fromkeys(text for text in texts if text is not None))
