"""Lower bounds on epsilon from how well an attacker guesses, with a stated confidence."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import scipy.stats

from keras_bandmf._checks import checked_float, checked_int
from keras_bandmf.accounting.trade_off import largest_true_positive_rates


class Evidence(NamedTuple):
    """What independent trials show about the error rates of one attack.

    Attributes:
        true_positives: A lower bound on the probability that the attack says "in" of a canary that
            is in.
        false_positives: An upper bound on the probability that it says "in" of one that is out.
        epsilon: The lower bound on epsilon that follows at the given delta.
    """

    true_positives: float
    false_positives: float
    epsilon: float


class Trials(NamedTuple):
    """The scores of independent trials by each of several attacks, 1-D; high means "in".

    Attributes:
        chosen_in: Of canaries that are in, to choose attack and threshold by.
        chosen_out: Of canaries that are out, for the same.
        counted_in: Of other canaries that are in, which count.
        counted_out: Of other canaries that are out, which count.
    """

    chosen_in: Sequence[np.ndarray]
    chosen_out: Sequence[np.ndarray]
    counted_in: Sequence[np.ndarray]
    counted_out: Sequence[np.ndarray]


def rates_of_trials(
    trials: Trials,
    delta: float,
    confidence: float,
    claims: Sequence[tuple[float, float]] = (),
) -> tuple[Evidence, int, float]:
    """Bounds the error rates of the best of several attacks, from independent trials.

    Attack and threshold are chosen on the first trials and counted on the others, so that choosing
    costs no confidence.

    Args:
        trials: The scores.
        delta: In [0, 1).
        confidence: In (0, 1).
        claims: Pairs (epsilon, delta). If there are any, attack and threshold are chosen to
            contradict them, else for the largest epsilon at `delta`.

    Returns:
        The evidence, the index of the attack, and its threshold: scores at or above it say "in".

    Raises:
        ValueError: If a part has no score, or one is not a number.

    Formal guarantees: if all counted trials are independent of each other and of the choice, both
        rates lie within their bounds with probability `confidence` at least (Clopper and Pearson,
        half of the error for each), and epsilon is then at least the bound of any mechanism that
        is (epsilon, `delta`)-differentially private.
    """
    checked_float("delta", delta, minimum=0.0, below=1.0)
    checked_float("confidence", confidence, above=0.0, below=1.0)
    for name, part in trials._asdict().items():
        if not len(part) or any(np.ndim(s) != 1 or not len(s) or np.isnan(s).any() for s in part):
            raise ValueError(
                f"Expected `{name}` to hold at least one score by each attack, and no NaN. "
                f"Received: shapes {[np.shape(s) for s in part]}"
            )
    best = (-math.inf, 0, 0.0)
    for attack, (inside, outside) in enumerate(
        zip(trials.chosen_in, trials.chosen_out, strict=True)
    ):
        thresholds = _thresholds(inside, outside)
        tp = _at_least(inside, thresholds)
        fp = _at_least(outside, thresholds)
        low, high = _bounds(tp, len(inside), fp, len(outside), confidence)
        if claims:
            gain = low - largest_true_positive_rates(claims, high)
        else:  # where no epsilon above zero shows, the largest gap of the rates decides
            gain = np.maximum(_epsilons(low, high, delta), low - high - 1.0)
        k = int(np.argmax(gain))
        best = max(best, (float(gain[k]), attack, float(thresholds[k])))
    _, attack, threshold = best
    inside, outside = trials.counted_in[attack], trials.counted_out[attack]
    tp, fp = (np.array([np.sum(np.asarray(s) >= threshold)]) for s in (inside, outside))
    low, high = _bounds(tp, len(inside), fp, len(outside), confidence)
    epsilon = max(0.0, float(_epsilons(low, high, delta)[0]))
    return Evidence(float(low[0]), float(high[0]), epsilon), attack, threshold


def contradicted(
    evidence: Evidence, claims: Sequence[tuple[float, float]]
) -> tuple[float, float] | None:
    """Returns the claim (epsilon, delta) that the error rates contradict most clearly, or None.

    Args:
        evidence: Bounds on the rates. They hold together, so that every claim may be compared.
        claims: Pairs (epsilon, delta), all of which are claimed.

    Formal guarantees: a mechanism that is (epsilon, delta)-differentially private for every claim
        is contradicted only where a rate is out of its bound.
    """
    most, worst = 0.0, None
    for claim in claims:
        rates = np.array([evidence.false_positives])
        excess = evidence.true_positives - float(largest_true_positive_rates([claim], rates)[0])
        if excess > most:
            most, worst = excess, claim
    return worst


def one_run_lower_bound(
    correct: int, guesses: int, canaries: int, delta: float, confidence: float
) -> float:
    """Returns a lower bound on epsilon from guesses about the coins of one run.

    Args:
        correct: How many guesses were right.
        guesses: How many were made, a number fixed in advance.
        canaries: How many canaries there were, each in or out by a fair coin of its own.
        delta: In [0, 1).
        confidence: In (0, 1).

    Returns:
        The bound; 0 if the guesses are no better than chance can be.

    Raises:
        TypeError: If a number is of the wrong type.
        ValueError: If a number is out of range.

    Formal guarantees: of a mechanism that is (epsilon, `delta`)-differentially private under adding
        or removing one canary, the result exceeds epsilon with probability at most
        `1 - confidence` (Steinke, Nasr and Jagielski, https://arxiv.org/abs/2305.08846, theorem
        5.2: the number of right guesses is below a binomial one with success probability
        e^epsilon / (1 + e^epsilon), apart from what delta adds).
    """
    canaries = checked_int("canaries", canaries)
    guesses = checked_int("guesses", guesses)
    correct = checked_int("correct", correct, minimum=0)
    if not correct <= guesses <= canaries:
        raise ValueError(
            "Expected correct <= guesses <= canaries. Received: "
            f"correct={correct}, guesses={guesses}, canaries={canaries}"
        )
    checked_float("delta", delta, minimum=0.0, below=1.0)
    checked_float("confidence", confidence, above=0.0, below=1.0)
    error = 1.0 - confidence

    def explained(epsilon: float) -> bool:
        return _one_run_p_value(correct, guesses, canaries, epsilon, delta) > error

    if explained(0.0):
        return 0.0
    low, high = 0.0, 1.0
    while not explained(high):
        low, high = high, 2.0 * high
    for _ in range(60):
        middle = 0.5 * (low + high)
        if explained(middle):
            high = middle
        else:
            low = middle
    return low


def _one_run_p_value(
    correct: int, guesses: int, canaries: int, epsilon: float, delta: float
) -> float:
    """Bounds the probability of so many right guesses under (epsilon, delta)."""
    right = 1.0 / (1.0 + math.exp(-epsilon))
    enough = float(scipy.stats.binom.sf(correct - 1, guesses, right))
    if correct == 0 or delta == 0:
        return enough
    fewer = np.arange(1, correct + 1)
    just_missed = np.cumsum(scipy.stats.binom.pmf(correct - fewer, guesses, right))
    return min(1.0, enough + 2.0 * canaries * delta * float(np.max(just_missed / fewer)))


def _thresholds(inside: np.ndarray, outside: np.ndarray) -> np.ndarray:
    """Returns thresholds to choose from: scores that occur, at most 500 of them."""
    known = np.unique(np.concatenate([inside, outside]))
    return known[np.unique(np.linspace(0, len(known) - 1, 500).astype(int))]


def _at_least(scores: np.ndarray, thresholds: np.ndarray) -> np.ndarray:
    return len(scores) - np.searchsorted(np.sort(scores), thresholds, side="left")


def _bounds(
    tp: np.ndarray, inside: int, fp: np.ndarray, outside: int, confidence: float
) -> tuple[np.ndarray, np.ndarray]:
    """Clopper and Pearson's bounds of both rates, with half of the error for each."""
    error = 0.5 * (1.0 - confidence)
    low = np.where(tp > 0, scipy.stats.beta.ppf(error, np.maximum(tp, 1), inside - tp + 1), 0.0)
    missed = np.maximum(outside - fp, 1)
    high = np.where(fp < outside, scipy.stats.beta.ppf(1.0 - error, fp + 1, missed), 1.0)
    return low, high


def _epsilons(low: np.ndarray, high: np.ndarray, delta: float) -> np.ndarray:
    """Returns the epsilon that a true- and a false-positive rate need, or minus infinity."""
    with np.errstate(divide="ignore", invalid="ignore"):
        right = np.log(np.maximum(low - delta, 0.0)) - np.log(high)
        wrong = np.log(np.maximum(1.0 - high - delta, 0.0)) - np.log(1.0 - low)
    return np.maximum(right, wrong)
