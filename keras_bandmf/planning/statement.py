"""Privacy statements: what ran, or would run, and what is guaranteed, in words and in JSON."""

from __future__ import annotations

import dataclasses
import math
import textwrap
from typing import Any

from keras_bandmf._checks import checked_float, checked_int
from keras_bandmf._html import facts
from keras_bandmf._printed import rounded_down, rounded_up
from keras_bandmf.accounting.composition import Event
from keras_bandmf.planning.attacker import AttackerTerms
from keras_bandmf.planning.documents import read_document, write_document
from keras_bandmf.sampling.laws import Adjacency

_FORMAT = "keras_bandmf.Statement"
_VERSION = 4
_OLD_VERSION = 3  # without the fields of `_NEW`
_WIDTH = 88
_NEW = {"attacker", "accounted_delta", "noise_tail"}
_UNSET = "set when the model is compiled"

NOT_COVERED = (
    "metrics and losses of training and validation: they are computed from the raw data, so they "
    "may be published only if that data is public",
    "preprocessing that was fitted to the data, such as a vocabulary: treated as public",
    "the number of rows, num_examples: treated as public. Under add-or-remove-one, a neighboring "
    "data set has one row more or fewer. The mechanism samples its rows at the same rate, and "
    "epsilon compares the two; but a run on any number of rows other than num_examples is refused, "
    "which reveals the number",
    "the weights that training started from: treated as public",
    "tuning: other runs on the same data, and choosing among them, add to epsilon",
    "several rows of one person: the privacy loss of a person grows with the number of rows",
    "an attacker who can read process memory, the checkpoints (they contain the run key and the "
    "noise state), or training times",
)

ADJACENCY_IN_WORDS: dict[Adjacency, str] = {
    "add-or-remove-one": "data sets that differ by adding or removing one {unit}",
    "zero-out": "data sets that differ by blanking one {unit} (it contributes nothing)",
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Statement:
    """A privacy statement: what was trained, how, and what that guarantees.

    `keras_bandmf.statement(model)` returns the statement of a run, and `TrainingPlan.statement`
    that of a plan. Printed, it is a text for readers who do not know the code. It only holds
    facts; nothing is computed here.

    Formal guarantees: none of its own. It states that the released weights (every one of them,
    not the last alone) are (epsilon, delta)-differentially private under `adjacency`, provided
    the facts it was given are true. `private=False` withdraws the claim, and `str` says so first.

    Attributes:
        executed: True for a run; False prints "planned, not executed".
        mechanism: What was done to the gradients, in words.
        epsilon: The guarantee for `steps_charged` steps; may be infinite.
        delta: In (0, 1).
        adjacency: "add-or-remove-one" or "zero-out".
        sampling: How batches were drawn, in words.
        steps_charged: The number of steps that epsilon covers.
        steps_run: The number of optimizer updates that were made; 0 for a plan.
        num_steps: The number of steps of the plan.
        num_examples: N, a public constant.
        batch_size: The expected batch size.
        num_bands: The number of bands of the strategy; 1 is DP-SGD.
        noise_multiplier: sigma.
        unit: What the guarantee protects.
        l2_norm_clip: The per-example clip norm; None for a plan.
        clipping: The clipping mode and its sensitivity, in words; None for a plan.
        accountant: The accountant that computed epsilon.
        other_accountants: Epsilon by other accountants, by name.
        key_origin: Where the run key came from.
        data: What was trained on; for data that the user feeds, the declared participations.
        not_covered: What the guarantee says nothing about.
        caveats: What the reader must know about this very run (replay, delta > 1/N, ...).
        private: False if the claim does not hold.
        not_private_reason: Why the claim does not hold; None if it does.
        plan_fingerprint: The SHA-256 of the plan, in hexadecimal.
        events: What epsilon covers: (rounds, sampling probability, noise multiplier) of each
            Gaussian mechanism. With it the statement can be composed with that of another run.
        runs: For several runs on the same data, the statement of each; otherwise empty. Steps are
            then those of all runs together, epsilon and delta are composed, and other single
            numbers (batch size, bands, noise, clip norm) are those of the last run.
        run_id: A random name of the run; None for a plan or several runs. It keeps one run from
            being counted twice, and two equal runs from being taken for one.
        attacker: What an attacker can do at most; None if epsilon is 0 or infinite, or for a
            statement that an earlier release wrote.
        accounted_delta: The delta that the accountant computed epsilon at: `delta` less what the
            noise of finitely many bits may cost. None for an epsilon that is not the accountant's
            (of a secret group) and for statements of an earlier release.
        noise_tail: At least the total variation between the noise that ran, whose tails are cut,
            and noise whose tails go on. None where no noise ran, for several runs (each has its
            own), and for statements of an earlier release.

    Raises:
        TypeError: A number has the wrong type.
        ValueError: A value is out of range, or two values contradict each other.

    Example:
        >>> import keras_bandmf as bandmf
        >>> plan = bandmf.TrainingPlan(
        ...     num_examples=1_000, batch_size=50, epochs=3, num_bands=4,
        ...     noise_multiplier=1.5, delta=1e-5,
        ... )
        >>> statement = plan.statement()
        >>> statement.private, statement.executed, statement.steps_charged
        (True, False, 60)
        >>> print(str(statement).splitlines()[3])
        private, with epsilon = 2.983 and delta = 1e-05, for data sets that differ by adding or
        >>> bandmf.Statement.from_json(statement.to_json()) == statement
        True
    """

    executed: bool
    mechanism: str
    epsilon: float
    delta: float
    adjacency: Adjacency
    sampling: str
    steps_charged: int
    steps_run: int
    num_steps: int
    num_examples: int
    batch_size: int
    num_bands: int
    noise_multiplier: float
    unit: str = "row of the training data"
    l2_norm_clip: float | None = None
    clipping: str | None = None
    accountant: str = "PLD"
    other_accountants: dict[str, float] = dataclasses.field(default_factory=dict)
    key_origin: str = "none drawn yet"
    data: str = "none yet"
    not_covered: tuple[str, ...] = NOT_COVERED
    caveats: tuple[str, ...] = ()
    private: bool = True
    not_private_reason: str | None = None
    plan_fingerprint: str | None = None
    events: tuple[Event, ...] = ()
    runs: tuple[Statement, ...] = ()
    run_id: str | None = None
    attacker: AttackerTerms | None = None
    accounted_delta: float | None = None
    noise_tail: float | None = None

    def __post_init__(self) -> None:
        for name in ("executed", "private"):
            if not isinstance(getattr(self, name), bool):
                _refuse(name, "a bool", getattr(self, name))
        for name in ("mechanism", "sampling", "unit", "accountant", "key_origin", "data"):
            if not isinstance(getattr(self, name), str) or not getattr(self, name):
                _refuse(name, "a non-empty string", getattr(self, name))
        for name in ("steps_charged", "steps_run"):
            self._set(name, checked_int(name, getattr(self, name), minimum=0))
        for name in ("num_steps", "num_examples", "batch_size", "num_bands"):
            self._set(name, checked_int(name, getattr(self, name)))
        self._set("epsilon", _checked_epsilon("epsilon", self.epsilon))
        self._set("delta", checked_float("delta", self.delta, above=0.0, below=1.0))
        sigma = checked_float("noise_multiplier", self.noise_multiplier, minimum=0.0)
        self._set("noise_multiplier", sigma)
        if self.l2_norm_clip is not None:
            clip = checked_float("l2_norm_clip", self.l2_norm_clip, above=0.0)
            self._set("l2_norm_clip", clip)
        if self.clipping is not None and (not isinstance(self.clipping, str) or not self.clipping):
            _refuse("clipping", "a non-empty string or None", self.clipping)
        if self.adjacency not in ADJACENCY_IN_WORDS:
            _refuse("adjacency", f"one of {sorted(ADJACENCY_IN_WORDS)}", self.adjacency)
        for name in ("not_covered", "caveats"):
            self._set(name, _checked_strings(name, getattr(self, name)))
        others = {
            name: _checked_epsilon("other_accountants", value)
            for name, value in dict(self.other_accountants).items()
        }
        self._set("other_accountants", others)
        self._set("events", tuple(_checked_event(event) for event in self.events))
        self._set("runs", tuple(self.runs))
        if self.run_id is not None and (not isinstance(self.run_id, str) or not self.run_id):
            _refuse("run_id", "a non-empty string or None", self.run_id)
        if not all(isinstance(run, Statement) for run in self.runs):
            _refuse("runs", "a sequence of statements", self.runs)
        attacker: object = self.attacker
        if not isinstance(attacker, (AttackerTerms, type(None))):
            _refuse("attacker", "AttackerTerms or None", attacker)
        if self.accounted_delta is not None:
            ideal = checked_float("accounted_delta", self.accounted_delta, above=0.0, below=1.0)
            self._set("accounted_delta", ideal)
        if self.noise_tail is not None:
            self._set("noise_tail", checked_float("noise_tail", self.noise_tail, minimum=0.0))
        self._check_steps()
        self._check_privacy()

    def _set(self, name: str, value: Any) -> None:
        object.__setattr__(self, name, value)

    def _check_steps(self) -> None:
        if max(self.steps_charged, self.steps_run) > self.num_steps:
            raise ValueError(
                f"Expected at most num_steps={self.num_steps} steps. Received: "
                f"steps_charged={self.steps_charged}, steps_run={self.steps_run}."
            )
        if self.steps_run > self.steps_charged:
            raise ValueError(
                "Expected every step that ran to be charged. Received: "
                f"steps_run={self.steps_run}, steps_charged={self.steps_charged}."
            )

    def _check_privacy(self) -> None:
        # No noise is no privacy, whatever the caller claims.
        if math.isinf(self.epsilon) and self.private:
            self._set("private", False)
            self._set("not_private_reason", "there is no noise: epsilon is infinite")
        if self.private != (self.not_private_reason is None):
            raise ValueError(
                "Expected `not_private_reason` exactly when `private` is False. Received: "
                f"private={self.private}, not_private_reason={self.not_private_reason!r}."
            )

    def __hash__(self) -> int:
        return hash(self.to_json())

    def to_json(self) -> str:
        """Returns the statement as strict JSON.

        Returns:
            JSON; an infinite epsilon is the string "inf".
        """
        return write_document(_FORMAT, _VERSION, _facts(self), indent=2)

    @classmethod
    def from_json(cls, text: str) -> Statement:
        """Reads what `to_json` wrote; the result equals the original.

        Args:
            text: JSON.

        Returns:
            The statement.

        Raises:
            TypeError: `text` is not a string, or a number has the wrong type.
            ValueError: The format or version is unknown, fields are missing or unknown, or a
                value is out of range.
        """
        fields = {field.name for field in dataclasses.fields(cls)}
        versions = {_OLD_VERSION: fields - _NEW, _VERSION: fields}
        return cls._from_facts(read_document(text, _FORMAT, versions))

    @classmethod
    def _from_facts(cls, facts: dict[str, Any]) -> Statement:
        fields = {field.name for field in dataclasses.fields(cls)}
        if not isinstance(facts, dict) or set(facts) not in (fields, fields - _NEW):
            _refuse("runs", "a list of statements", facts)
        facts = dict.fromkeys(_NEW) | facts
        if facts["attacker"] is not None:
            facts["attacker"] = AttackerTerms.from_config(facts["attacker"])
        if not isinstance(facts["runs"], (list, tuple)):
            _refuse("runs", "a list of statements", facts["runs"])
        facts = facts | {"runs": tuple(cls._from_facts(run) for run in facts["runs"])}
        others = facts["other_accountants"]
        if not isinstance(others, dict):
            _refuse("other_accountants", "an object", others)
        facts["epsilon"] = _number_from_json(facts["epsilon"])
        facts["other_accountants"] = {
            name: _number_from_json(value) for name, value in others.items()
        }
        return cls(**facts)

    def __str__(self) -> str:
        """The statement as a text."""
        lines = [self._title, "=" * len(self._title)]
        if not self.private:
            lines += [f"NOT PRIVATE: {self.not_private_reason}.", self._claim("would be"), ""]
        else:
            lines += [self._claim("are" if self.executed else "would be"), ""]
        rows = _rows_of_runs(self) if self.runs else _rows(self)
        lines += [_item(name, text) for name, text in rows]
        if self.caveats:
            lines += ["", "Caveats:", *(_bullet(text) for text in self.caveats)]
        lines += ["", "Not covered:", *(_bullet(text) for text in self.not_covered)]
        return "\n".join(lines)

    def _repr_html_(self) -> str:
        rows = _rows_of_runs(self) if self.runs else _rows(self)
        verb = "are" if self.executed and self.private else "would be"
        first = [] if self.private else [("NOT PRIVATE", f"{self.not_private_reason}.")]
        claim = " ".join(self._claim(verb).split())
        notes = [("caveat", text) for text in self.caveats]
        notes += [("not covered", text) for text in self.not_covered]
        return facts(self._title, [*first, ("claim", claim), *rows, *notes])

    @property
    def _title(self) -> str:
        return "Privacy statement" if self.executed else "Privacy statement: planned, not executed"

    def _claim(self, verb: str) -> str:
        condition = "" if self.private else "If that were otherwise, "
        words = ADJACENCY_IN_WORDS[self.adjacency].format(unit=self.unit)
        steps = f"up to step {self.steps_charged}"
        if self.runs:
            steps = f"of {len(self.runs)} runs on the same data, all together,"
        return textwrap.fill(
            f"{condition}{'The' if self.private else 'the'} weights after every step {steps} "
            f"{verb} (epsilon, delta)-differentially private, with "
            f"epsilon = {rounded_up(self.epsilon, 4)} and delta = {rounded_up(self.delta, 3)}, "
            f"for {words}.",
            _WIDTH,
        )


def _rows(statement: Statement) -> list[tuple[str, str]]:
    """Returns the names and texts of the lines of one run or plan."""
    clip = _UNSET if statement.l2_norm_clip is None else rounded_up(statement.l2_norm_clip, 6)
    accountant = f"by the {statement.accountant} accountant"
    steps = f"{statement.steps_run} run, {statement.steps_charged} charged"
    steps = f"{steps}, {statement.num_steps} planned"
    sigma = rounded_down(statement.noise_multiplier, 6)
    rows = [
        ("epsilon", f"{rounded_up(statement.epsilon, 6)} {accountant}"),
        *(
            ("", f"{rounded_up(value, 6)} by {name}")
            for name, value in statement.other_accountants.items()
        ),
        ("delta", rounded_up(statement.delta, 6)),
        *(() if statement.attacker is None else statement.attacker.rows()),
        ("adjacency", statement.adjacency),
        ("unit", f"one {statement.unit}"),
        ("mechanism", statement.mechanism),
        ("sampling", statement.sampling),
        ("examples", f"{statement.num_examples}, {statement.batch_size} expected in a batch"),
        ("steps", steps),
        ("noise", f"multiplier {sigma}, {_bands(statement.num_bands)}"),
        ("clip norm", clip),
        ("clipping", statement.clipping or _UNSET),
        ("run key", statement.key_origin),
        ("data", statement.data),
    ]
    if statement.plan_fingerprint is not None:
        rows.append(("plan", statement.plan_fingerprint))
    return rows


def _rows_of_runs(statement: Statement) -> list[tuple[str, str]]:
    """Returns the names and texts of the lines of several runs."""
    shared = (
        "epsilon",
        "delta",
        "attacker",
        "mu",
        "at deltas",
        "adjacency",
        "unit",
        "mechanism",
        "sampling",
        "run key",
    )
    rows = [row for row in _rows(statement) if row[0] in shared]
    for number, run in enumerate(statement.runs, 1):
        own = dict(_rows(run))
        clip = f"clip norm {own['clip norm']}, noise {own['noise']}"
        alone = f"alone epsilon {rounded_up(run.epsilon, 6)} at delta {own['delta']}"
        rows += [
            (f"run {number}", f"{alone}; steps: {own['steps']}; {clip}"),
            ("", f"examples: {own['examples']}; data: {run.data}"),
            ("", f"plan {run.plan_fingerprint}"),
        ]
    return rows


def _facts(statement: Statement) -> dict[str, Any]:
    """Returns the fields as values of JSON."""
    fields = dataclasses.fields(statement)
    facts = {field.name: getattr(statement, field.name) for field in fields}
    facts["runs"] = [_facts(run) for run in statement.runs]
    facts["epsilon"] = _number_to_json(statement.epsilon)
    others = statement.other_accountants.items()
    facts["other_accountants"] = {name: _number_to_json(value) for name, value in others}
    facts["attacker"] = None if statement.attacker is None else statement.attacker.get_config()
    return facts


def _checked_event(event: Any) -> Event:
    if isinstance(event, str) or len(event) != 3:
        _refuse("events", "triples of rounds, sampling probability and noise multiplier", event)
    rounds, probability, sigma = event
    probability = checked_float("events", probability, minimum=0.0)
    if probability > 1:
        _refuse("events", "sampled with a probability", event)
    return (checked_int("events", rounds), probability, checked_float("events", sigma, minimum=0))


def _bands(num_bands: int) -> str:
    return "independent (DP-SGD)" if num_bands == 1 else f"correlated over {num_bands} steps"


def _item(name: str, text: str) -> str:
    lead = f"{name:<11}"
    return textwrap.fill(text, _WIDTH, initial_indent=lead, subsequent_indent=" " * len(lead))


def _bullet(text: str) -> str:
    return textwrap.fill(text, _WIDTH, initial_indent=" * ", subsequent_indent="   ")


def _checked_epsilon(name: str, value: Any) -> float:
    if isinstance(value, float) and value == math.inf:
        return math.inf
    return checked_float(name, value, minimum=0.0)


def _checked_strings(name: str, value: Any) -> tuple[str, ...]:
    if isinstance(value, str) or not all(isinstance(text, str) for text in value):
        _refuse(name, "a sequence of strings", value)
    return tuple(value)


def _number_to_json(value: float) -> float | str:
    return "inf" if value == math.inf else value


def _number_from_json(value: Any) -> Any:
    return math.inf if value == "inf" else value  # anything else is checked by __post_init__


def _refuse(name: str, expected: str, value: Any) -> None:
    raise ValueError(f"Expected `{name}` to be {expected}. Received: {name}={value!r}.")
