"""Computes the epsilon of a privacy statement again, with dp_accounting and SciPy alone.

    python -m keras_bandmf_cli.verification statement.json

The file is what `statement.to_json()` wrote. Nothing of keras_bandmf is imported, and this module
also runs alone: copy it. What is checked: that the events of the statement (rounds, sampling
probability, noise multiplier) have its epsilon at its `accounted_delta`, to four digits. What is
not: that the run was what the events say; that is the package's own claim. The epsilon of a secret
group is an upper confidence bound from samples, and no other library computes it: only that of a
known group is computed, which must be above it.
"""

from __future__ import annotations

import argparse
import json
import math
import pathlib
from typing import Any

import dp_accounting
import scipy.optimize
from dp_accounting.pld import PLDAccountant
from scipy.stats import norm

DIGITS = 4


def gaussian_epsilon(sigma: float, delta: float) -> float:
    """Solves the analytic Gaussian mechanism (Balle and Wang 2018, theorem 8) for epsilon."""

    def excess(epsilon: float) -> float:
        second = math.exp(epsilon + norm.logcdf(-0.5 / sigma - epsilon * sigma))
        return norm.cdf(0.5 / sigma - epsilon * sigma) - second - delta

    if excess(0.0) <= 0.0:
        return 0.0
    high = 0.5 / sigma**2 + math.sqrt(-2.0 * math.log(delta)) / sigma
    return float(scipy.optimize.brentq(excess, 0.0, high, xtol=1e-12))


def epsilon_of(events: list[list[float]], delta: float) -> float:
    """Returns the epsilon of (rounds, sampling probability, noise multiplier) triples."""
    if all(rate == 1.0 for _, rate, _ in events):
        precision = math.fsum(rounds / sigma**2 for rounds, _, sigma in events)
        return gaussian_epsilon(precision**-0.5, delta)
    accountant = PLDAccountant()
    for rounds, rate, sigma in events:
        event = dp_accounting.PoissonSampledDpEvent(rate, dp_accounting.GaussianDpEvent(sigma))
        accountant.compose(dp_accounting.SelfComposedDpEvent(event, int(rounds)))
    return float(accountant.get_epsilon(delta))


def verify(statement: dict[str, Any]) -> tuple[bool, str]:
    """Returns whether the epsilon of a statement is confirmed, and what was found, in words."""
    if (statement["format"], statement["version"]) != ("keras_bandmf.Statement", 4):
        return False, "Not verified: this is not version 4 of a keras_bandmf.Statement."
    stated = statement["epsilon"]
    if not statement["private"] or stated == "inf":
        return False, f"Nothing to verify: not private ({statement['not_private_reason']})."
    if not statement["events"]:
        return stated == 0.0, f"No step was charged; epsilon {stated}."
    delta = statement["accounted_delta"]
    if delta is None:
        known = epsilon_of(statement["events"], statement["delta"] * (1 - 1e-3))
        return stated <= known * 1.0001, (
            f"Not verified: epsilon {stated} is an upper confidence bound from samples, with "
            f"groups counted as secret ({statement['accountant']}). Computed here: epsilon "
            f"{known:.6g} of known groups, which must be above it."
        )
    found = epsilon_of(statement["events"], delta)
    places = math.floor(math.log10(max(stated, 1e-4))) + 1 - DIGITS  # epsilon may be 0
    same = abs(found - stated) <= 0.5 * 10.0**places
    word = "Verified" if same else "NOT THE SAME"
    return same, (
        f"{word}: stated epsilon {stated:.6g}, computed here {found:.6g}, at delta {delta:.6g}."
    )


def main(arguments: list[str] | None = None) -> int:
    """Prints what was found; 0 if it is as stated."""
    parser = argparse.ArgumentParser(description="Computes a statement's epsilon again.")
    parser.add_argument("statement", type=pathlib.Path)
    path = parser.parse_args(arguments).statement
    confirmed, text = verify(json.loads(path.read_text()))
    print(text)
    return 0 if confirmed else 1


if __name__ == "__main__":
    raise SystemExit(main())
