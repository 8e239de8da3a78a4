"""What a statement says in terms of an attacker."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from keras_bandmf._checks import checked_float
from keras_bandmf._printed import rounded_up
from keras_bandmf.accounting.trade_off import (
    FALSE_POSITIVE_RATES,
    TradeOff,
    finite_noise,
    trade_off,
)

if TYPE_CHECKING:
    from keras_bandmf.planning.statement import Statement


@dataclasses.dataclass(frozen=True)
class AttackerTerms:
    """What an attacker can do at most who sees the weights after every step.

    The attacker knows all examples, and decides whether one of them took part. Pairs are ascending.

    Formal guarantees: see `accounting.trade_off`. All numbers are rounded up.

    Attributes:
        mu: No attacker's true-positive rate is above that of the best test of N(0, 1) against
            N(mu, 1) at the same false-positive rate, by more than the delta of the statement.
        true_positive_rates: (false-positive rate, largest true-positive rate) pairs.
        epsilons: (delta, epsilon) pairs, each of which holds.
    """

    mu: float
    true_positive_rates: tuple[tuple[float, float], ...]
    epsilons: tuple[tuple[float, float], ...]

    def __post_init__(self) -> None:
        object.__setattr__(self, "mu", checked_float("mu", self.mu, minimum=0.0))
        for name in ("true_positive_rates", "epsilons"):
            pairs = tuple(_pair(name, pair) for pair in getattr(self, name))
            object.__setattr__(self, name, pairs)
        if any(rate > 1.0 for _, rate in self.true_positive_rates):
            raise ValueError(
                "Expected `true_positive_rates` to be at most 1. Received: "
                f"true_positive_rates={self.true_positive_rates}."
            )

    def get_config(self) -> dict[str, Any]:
        """Returns the terms as values of JSON."""
        return {
            "mu": self.mu,
            "true_positive_rates": [list(pair) for pair in self.true_positive_rates],
            "epsilons": [list(pair) for pair in self.epsilons],
        }

    @classmethod
    def from_config(cls, config: object) -> AttackerTerms:
        """Reads what `get_config` returned.

        Raises:
            TypeError: A number has the wrong type.
            ValueError: It is of another make, or a value is out of range.
        """
        names = [field.name for field in dataclasses.fields(cls)]
        if not isinstance(config, dict) or set(config) != set(names):
            raise ValueError(
                f"Expected `attacker` to be an object with {names}. Received: attacker={config!r}."
            )
        for name in names[1:]:
            if not isinstance(config[name], (list, tuple)):
                raise ValueError(
                    f"Expected `{name}` to be a list. Received: {name}={config[name]!r}."
                )
        return cls(**config)

    def rows(self) -> list[tuple[str, str]]:
        """Returns the names and texts of the lines of a statement."""
        rates = ", ".join(
            f"{rounded_up(100 * true, 3)} % at {100 * false:g} %"
            for false, true in self.true_positive_rates
        )
        epsilons = ", ".join(
            f"{rounded_up(epsilon, 4)} at {rounded_up(delta, 2)}"
            for delta, epsilon in self.epsilons
        )
        return [
            ("attacker", f"true-positive rate of at most {rates} false-positive rate"),
            ("mu", f"{rounded_up(self.mu, 4)}, of Gaussian privacy, up to delta"),
            ("at deltas", f"epsilon {epsilons}"),
        ]


def attacker_terms(curve: TradeOff, epsilons: Sequence[tuple[float, float]]) -> AttackerTerms:
    """Returns what a statement says of a trade-off.

    Args:
        curve: The trade-off.
        epsilons: (delta, epsilon) pairs to name.
    """
    rates = tuple((rate, curve.true_positive_rate(rate)) for rate in FALSE_POSITIVE_RATES)
    return AttackerTerms(curve.mu(), rates, tuple(epsilons))


def with_attacker(statement: Statement, runs: Sequence[Statement] = ()) -> Statement:
    """Returns a statement with the attacker's terms that follow from its events and its epsilon.

    Args:
        statement: Of a plan, a run or several runs.
        runs: What the finite noise was charged for, each at its own delta; by default its `runs`,
            or itself.
    """
    known = statement_trade_off(statement, runs)
    terms = None if known is None else attacker_terms(*known)
    return dataclasses.replace(statement, attacker=terms)


def statement_trade_off(
    statement: Statement, runs: Sequence[Statement] = ()
) -> tuple[TradeOff, tuple[tuple[float, float], ...]] | None:
    """Returns the trade-off of a statement and its epsilons; None without steps or without noise.

    Args:
        statement: Of a plan, a run or several runs.
        runs: See `with_attacker`.
    """
    events = statement.events
    if not events or not 0.0 < statement.epsilon < math.inf:
        return None
    runs = runs or statement.runs or (statement,)
    if any(run.epsilon == math.inf for run in runs):
        return None
    noise = math.fsum(noise_tail(run) for run in runs)
    return trade_off(events, statement.epsilon, statement.delta, noise * (1 + 1e-12))


def noise_tail(run: Statement) -> float:
    """Returns at least the total variation that the cut tails of a run's noise may cost.

    Args:
        run: The statement of one run or plan. A run that does not say it was checked to cost no
            more than its share of delta at its own epsilon, and so is every plan when it runs.
    """
    if run.noise_tail is not None:
        return run.noise_tail
    return finite_noise(run.delta, run.epsilon)


def _pair(name: str, pair: Any) -> tuple[float, float]:
    if isinstance(pair, str) or not isinstance(pair, Sequence) or len(pair) != 2:
        raise ValueError(f"Expected `{name}` to hold pairs of numbers. Received: {pair!r}.")
    first, second = (checked_float(name, value, minimum=0.0) for value in pair)
    return first, second
