"""`AuditReport`: what an attack found, beside what was promised."""

from __future__ import annotations

import dataclasses
import textwrap
from typing import Any

import numpy as np

from keras_bandmf._checks import checked_float
from keras_bandmf._printed import rounded_down, rounded_up
from keras_bandmf.planning.documents import read_document, write_document

_FORMAT = "keras_bandmf.AuditReport"
_VERSION = 1
_ARRAYS = ("scores_in", "scores_out")


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class AuditReport:
    """What an attack on a run found, beside the epsilon that its plan states.

    Attributes:
        kind: "step" for `audit_steps`, "one run" for `audit_run`.
        attack: What the attacker looked at, in words.
        epsilon_lower_bound: Epsilon is at least this, with probability `confidence`.
        epsilon: What the plan states.
        delta: The delta of both.
        confidence: In (0, 1).
        scores_in: The scores of the canaries that took part, higher where the attacker is surer.
        scores_out: The scores of those that did not.
        details: What was counted, in words.
        contradicted: Of several claims (epsilon, delta) of the plan, the one that the attack
            contradicts most clearly; None if there is none.

    Raises:
        ValueError: If a number is out of range.

    Example:
        >>> import numpy as np
        >>> import keras_bandmf as bandmf
        >>> report = bandmf.audit.AuditReport(
        ...     kind="step", attack="matched filter", epsilon_lower_bound=1.5, epsilon=4.0,
        ...     delta=1e-5, confidence=0.95, scores_in=np.array([1.0, 2.0]),
        ...     scores_out=np.array([0.0, 1.0]))
        >>> report.consistent
        True
        >>> print(str(report).splitlines()[-1])
        This does not contradict the plan. It proves nothing more than the lower bound.
        >>> bandmf.audit.AuditReport.from_json(report.to_json()) == report
        True
    """

    kind: str
    attack: str
    epsilon_lower_bound: float
    epsilon: float
    delta: float
    confidence: float
    scores_in: np.ndarray
    scores_out: np.ndarray
    details: str = ""
    contradicted: tuple[float, float] | None = None

    def __post_init__(self) -> None:
        checked_float("epsilon_lower_bound", self.epsilon_lower_bound, minimum=0.0)
        checked_float("delta", self.delta, above=0.0, below=1.0)
        checked_float("confidence", self.confidence, above=0.0, below=1.0)
        for name in _ARRAYS:
            object.__setattr__(self, name, np.asarray(getattr(self, name), np.float64))
        if self.contradicted is not None:
            object.__setattr__(self, "contradicted", tuple(self.contradicted))

    @property
    def consistent(self) -> bool:
        """Whether the attack contradicts nothing that the plan states."""
        return self.contradicted is None and self.epsilon_lower_bound <= self.epsilon

    def roc(self) -> tuple[np.ndarray, np.ndarray]:
        """Returns the rates of the attack at every threshold.

        Returns:
            The false- and the true-positive rates, both increasing from 0 to 1.
        """
        thresholds = np.unique(np.concatenate([self.scores_in, self.scores_out]))[::-1]
        rates = [
            np.concatenate([[0.0], 1.0 - np.searchsorted(np.sort(s), thresholds) / len(s)])
            for s in (self.scores_out, self.scores_in)
        ]
        return rates[0], rates[1]

    def __eq__(self, other: object) -> bool:
        return isinstance(other, AuditReport) and self.to_json() == other.to_json()

    def __hash__(self) -> int:
        return hash(self.to_json())

    def __str__(self) -> str:
        """The report as a text."""
        title = f"Privacy audit ({self.kind})"
        share = rounded_down(100 * self.confidence, 4)
        least = rounded_down(self.epsilon_lower_bound, 4)
        bound = (
            f"The attack shows that epsilon is at least {least} at delta = "
            f"{rounded_up(self.delta, 3)}, with confidence {share} %. The plan states epsilon = "
            f"{rounded_up(self.epsilon, 4)}."
        )
        verdict = "This does not contradict the plan. It proves nothing more than the lower bound."
        if not self.consistent:
            verdict = "THE PLAN'S EPSILON IS FALSE for what ran."
            if self.contradicted is not None:
                epsilon, delta = self.contradicted
                verdict += (
                    " The claim contradicted most clearly is epsilon = "
                    f"{rounded_up(epsilon, 4)} at delta = {rounded_up(delta, 3)}."
                )
        lines = [title, "=" * len(title), f"attack: {self.attack}"]
        lines += [f"counted: {self.details}"] if self.details else []
        return "\n".join(textwrap.fill(line, 88) for line in [*lines, bound, verdict])

    def to_json(self) -> str:
        """Returns the report as strict JSON."""
        facts: dict[str, Any] = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        facts["epsilon"] = "inf" if np.isinf(self.epsilon) else self.epsilon
        for name in _ARRAYS:
            facts[name] = facts[name].tolist()
        return write_document(_FORMAT, _VERSION, facts, indent=2)

    @classmethod
    def from_json(cls, text: str) -> AuditReport:
        """Reads what `to_json` wrote; the result equals the original.

        Args:
            text: JSON.

        Returns:
            The report.

        Raises:
            TypeError: `text` is not a string.
            ValueError: The format or version is unknown, or fields are missing or unknown.
        """
        fields = {field.name for field in dataclasses.fields(cls)}
        facts = read_document(text, _FORMAT, {_VERSION: fields})
        facts["epsilon"] = float(facts["epsilon"])
        return cls(**facts)
