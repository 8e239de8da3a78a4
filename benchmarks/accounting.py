"""Calibrates random plans and checks every epsilon against formulas the library does not use.

Every plan is drawn from its own number and the seed, and its result appended to a file, so a run
goes on where it was stopped:

    python benchmarks/accounting.py --count=3000 --seed=7 --output=accounting.jsonl

Each epsilon is checked at the noise multiplier found:
 * no sampling: the closed form of the Gaussian, in arithmetic of 40 digits;
 * one round: the closed form of the sampled Gaussian;
 * more: delta as an integral over exponential moments of the exact loss (no grid of losses), where
   it converges; else dp_accounting's optimistic estimate of few rounds; and always one round.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import time
from collections.abc import Iterable, Iterator

import mpmath
import numpy as np
import scipy.special
from dp_accounting.pld import privacy_loss_distribution

from keras_bandmf.accounting.accountant import (
    FINE_ACCURACY,
    FINITE_NOISE_SHARE,
    calibrate_noise,
    epsilon_of,
)
from keras_bandmf.sampling.schedule import Schedule

_MAX_FREQUENCIES = 3000


def draw(seed: int, number: int) -> tuple[Schedule, float, float]:
    """The plan of that number: (schedule, epsilon, delta), log-uniform in every size."""
    rng = np.random.default_rng([seed, number])

    def between(low: float, high: float) -> float:
        return float(np.exp(rng.uniform(np.log(low), np.log(high))))

    sampling = "cyclic_poisson" if rng.random() < 0.7 else "fixed_order"
    examples = round(between(20, 1e8))
    batch = min(examples, round(between(1, examples)))
    steps = round(between(1, 1e6))
    most = min(steps, examples // batch)
    bands = min(most, round(between(1, most)))
    run = Schedule(sampling, examples, batch, steps, bands)
    return run, between(0.01, 100), between(1e-12, 1e-3)


def one_round_delta(q: float, sigma: float, epsilon: float) -> float:
    """delta(epsilon) of a sampled Gaussian, exactly: the larger of both orders of the pair."""

    def log_difference(log_a: float, log_b: float) -> float:
        return 0.0 if log_b >= log_a else math.exp(log_a) * -math.expm1(log_b - log_a)

    def normal(x: float) -> float:
        return float(scipy.special.log_ndtr(x))

    # Remove: q (Phi(1 - t) - e^epsilon' Phi(-t)) with e^epsilon' = 1 + (e^epsilon - 1) / q.
    inner = (
        float(np.logaddexp(math.log1p(-q), epsilon))
        if q == 1
        else math.log1p(math.expm1(min(epsilon, 700.0)) / q)
    )
    t = sigma**2 * inner + 0.5
    removed = q * log_difference(normal((1 - t) / sigma), inner + normal(-t / sigma))
    # Add: P = N(0), Q = mixture; the loss exceeds epsilon below t.
    gap = math.exp(-epsilon) - (1 - q)
    if gap <= 0.0:
        return removed
    t = sigma**2 * math.log(gap / q) + 0.5
    below = normal(t / sigma)
    mixture = np.logaddexp(math.log1p(-q) + below, math.log(q) + normal((t - 1) / sigma))
    return max(removed, log_difference(below, epsilon + float(mixture)))


def integral_delta(q: float, sigma: float, rounds: int, epsilon: float) -> float | None:
    """delta(epsilon) of the composition as a contour integral, or None where it is not resolved.

    delta = 1/(2 pi) int M(s)^k exp(-s epsilon) / (s (s + 1)) dw at s = order + i w, with M the
    moments E exp(s loss) of the exact loss, integrated over outputs by the trapezoidal rule.
    """
    parts = []
    for sign in (1, -1):  # remove, add
        x = np.linspace(-13 * sigma, 1 + 13 * sigma, 2001)
        plain = -0.5 * (x / sigma) ** 2 - math.log(sigma * math.sqrt(2 * math.pi))
        loss = np.logaddexp(math.log1p(-q), math.log(q) + (2 * x - 1) / (2 * sigma**2))
        log_mass = plain + (loss if sign > 0 else 0.0) + math.log(x[1] - x[0])
        loss = sign * loss

        def log_moment(order, log_mass=log_mass, loss=loss):
            terms = log_mass + order * loss
            return terms.max() + math.log(np.exp(terms - terms.max()).sum())

        orders = np.exp(np.linspace(-9, 14, 100))
        heights = [
            rounds * log_moment(r) - r * epsilon - math.log(r) - math.log1p(r) for r in orders
        ]
        order = float(orders[int(np.argmin(heights))])
        weight = np.exp(log_mass + order * loss - log_moment(order))
        keep = weight > 1e-22 * weight.max()
        weight, loss = weight[keep] / weight.sum(), loss[keep]
        spread = math.sqrt(rounds * float(weight @ (loss - weight @ loss) ** 2))
        # The sum's alias distance is 2 pi / step: 24 spreads away and 60 / order above.
        mean = rounds * float(weight @ loss)
        step = 2 * math.pi / (24 * spread + 60 / order + 2 * abs(mean - epsilon) + 12 * loss.max())
        frequencies = step * np.arange(_MAX_FREQUENCIES)
        if rounds * 30 * step * loss.max() > 1e9:
            return None
        blocks = []
        for block in np.array_split(frequencies, 30):
            blocks.append(np.exp(1j * np.outer(block, loss)) @ weight)
            largest = rounds * math.log(max(abs(blocks[-1]).max(), 1e-300))
            if largest < -35:
                break
        if largest > -25:
            return None
        moments = np.concatenate(blocks)
        frequencies = frequencies[: len(moments)]
        # Neighboring outputs must not turn by more than a quarter where there is mass.
        heavy = weight > 1e-12 * weight.max()
        useful = rounds * np.log(np.maximum(abs(moments), 1e-300)) > -32
        fastest = frequencies[useful].max()
        if fastest * np.abs(np.diff(loss[heavy])).max() > 1.0:
            return None
        s = order + 1j * frequencies
        terms = np.exp(rounds * np.log(moments) - 1j * frequencies * epsilon) / (s * (s + 1))
        total = (terms[0].real / 2 + terms[1:].real.sum()) * step / math.pi
        parts.append(math.exp(rounds * log_moment(order) - order * epsilon) * total)
    return max(parts)


def gaussian_delta(sigma: float, epsilon: float) -> float:
    """delta(epsilon) of the Gaussian mechanism, in 40 digits."""
    with mpmath.workdps(40):
        s, e = mpmath.mpf(sigma), mpmath.mpf(epsilon)
        first = mpmath.ncdf(1 / (2 * s) - e * s)
        return float(first - mpmath.exp(e) * mpmath.ncdf(-1 / (2 * s) - e * s))


def optimistic_delta(q: float, sigma: float, rounds: int, epsilon: float) -> float | None:
    """dp_accounting's optimistic estimate, less what its transform may be wrong by."""
    if rounds > 64 or not 0.1 <= sigma <= 1e3:
        return None
    try:
        one = privacy_loss_distribution.from_gaussian_mechanism(
            sigma,
            pessimistic_estimate=False,
            value_discretization_interval=max(1e-4, 1e-3 * epsilon / rounds),
            sampling_prob=q,
        )
        composed = one.self_compose(rounds)
    except ValueError:
        return None
    return float(composed.get_delta_for_epsilon(epsilon)) - rounds * 1e-14


def check(run: Schedule, sigma: float, epsilon: float) -> tuple[str, float]:
    """(the check, delta(epsilon) at least) at the noise multiplier `sigma`."""
    q = run.sampling_probability
    rounds = math.ceil(run.num_steps / run.num_bands)
    if q is None or q == 1.0:
        together = sigma if q is None else sigma / math.sqrt(rounds)
        return "Gaussian", gaussian_delta(together, epsilon)
    single = one_round_delta(q, sigma, epsilon)
    if rounds == 1:
        return "one round", single
    for name, method in (("integral", integral_delta), ("optimistic", optimistic_delta)):
        value = method(q, sigma, rounds, epsilon)
        if value is not None:
            return name, max(value, single)
    return "one round of several", single


def results(seed: int, numbers: Iterable[int], accuracy: float = FINE_ACCURACY) -> Iterator[dict]:
    """A record for each plan: what came out, whether it is safe, and the processor seconds."""
    for number in numbers:
        run, epsilon, delta = draw(seed, number)
        record = {"number": number, "target": epsilon, "delta": delta, **vars(run)}
        start = time.process_time()
        try:
            sigma = calibrate_noise(run, epsilon, delta, accuracy=accuracy)
            record["seconds"] = time.process_time() - start
            reported = epsilon_of(run.dp_event(sigma), delta, accuracy)
            kind, at_least = check(run, sigma, reported)
            at_most = delta * (1 - FINITE_NOISE_SHARE)
            record |= {"sigma": sigma, "epsilon": reported, "check": kind}
            record["used"] = float(at_least) / at_most
            record["safe"] = bool(reported <= epsilon and at_least <= at_most * (1 + 1e-7))
        except Exception as error:
            record |= {"error": f"{type(error).__name__}: {error}", "safe": False}
        yield record


def summary(records: list[dict]) -> str:
    """Crashes, unsafe plans, checks and seconds, in words."""
    seconds = [record["seconds"] for record in records if "seconds" in record]
    crashes = [record for record in records if "error" in record]
    unsafe = [record for record in records if not record["safe"]]
    lines = [
        f"{len(records)} plans: {len(crashes)} crashes, {len(unsafe)} not safe",
        f"processor seconds to calibrate: median {statistics.median(seconds):.3f}, "
        f"worst {max(seconds):.2f}",
    ]
    for kind in sorted({record.get("check", "none") for record in records}):
        used = [record["used"] for record in records if record.get("check") == kind]
        if used:
            lines.append(
                f"{kind}: {len(used)} plans; share of delta used: median "
                f"{statistics.median(used):.6f}, highest {max(used):.9f}"
            )
    lines += [f"not safe: {json.dumps(record)}" for record in unsafe[:20]]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--count", type=int, default=3000)
    parser.add_argument("--seed", type=int, default=7)
    parser.add_argument("--output", default="accounting.jsonl")
    arguments = parser.parse_args()
    records = []
    if os.path.exists(arguments.output):
        with open(arguments.output, encoding="utf-8") as file:
            records = [json.loads(line) for line in file]
    done = {record["number"] for record in records}
    left = [number for number in range(arguments.count) if number not in done]
    with open(arguments.output, "a", encoding="utf-8") as file:
        for record in results(arguments.seed, left):
            records.append(record)
            file.write(json.dumps(record) + "\n")
            file.flush()
    print(summary(records))


if __name__ == "__main__":
    main()
