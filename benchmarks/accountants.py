"""Epsilon of the same mechanisms by the accountants that others trust.

Each accountant that can be imported is asked; ours needs nothing that they need, so the script
runs in an environment with `jax-privacy`, `opacus` or `prv_accountant` and without TensorFlow:

    python benchmarks/accountants.py --output benchmarks/accountants.json

The table in benchmarks/accountants.json is compared with our own numbers by
tests/accounting/test_others.py.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import logging
import pathlib
from collections.abc import Callable

#: (rounds, sampling probability, noise multiplier, delta) of Poisson-sampled Gaussians.
MECHANISMS = (
    (1, 1.0, 1.0, 1e-6),
    (100, 0.05, 1.0, 1e-5),
    (900, 0.01, 0.8, 1e-6),
    (2000, 0.01, 1.5, 1e-6),
    (15, 0.2, 1.5, 1e-5),
    (5000, 0.002, 1.0, 1e-7),
)

Accountant = Callable[[int, float, float, float], float]


def dp_accounting_pld(rounds: int, rate: float, sigma: float, delta: float) -> float:
    """The upper bound of dp_accounting's privacy loss distributions ("connect the dots")."""
    from dp_accounting.pld import PLDAccountant

    return float(PLDAccountant().compose(_event(rounds, rate, sigma)).get_epsilon(delta))


def dp_accounting_rdp(rounds: int, rate: float, sigma: float, delta: float) -> float:
    """The upper bound of dp_accounting's Renyi accountant."""
    from dp_accounting.rdp import RdpAccountant

    return float(RdpAccountant().compose(_event(rounds, rate, sigma)).get_epsilon(delta))


def jax_privacy_pld(rounds: int, rate: float, sigma: float, delta: float) -> float:
    """The accountant of jax-privacy for DP-SGD, which composes events of dp_accounting."""
    from jax_privacy import accounting

    accountant = accounting.DpsgdTrainingAccountant(accounting.PldAccountantConfig())
    examples = 1_000_000
    params = accounting.DpParams(
        noise_multipliers=sigma,
        num_samples=examples,
        delta=delta,
        batch_size=round(rate * examples),
    )
    return float(accountant.compute_epsilon(rounds, params))


def opacus_rdp(rounds: int, rate: float, sigma: float, delta: float) -> float:
    """The Renyi accountant of Opacus."""
    return _opacus("rdp", rounds, rate, sigma, delta)


def opacus_prv(rounds: int, rate: float, sigma: float, delta: float) -> float:
    """The accountant of Opacus after Gopi et al. 2021: an upper bound, up to its error terms."""
    return _opacus("prv", rounds, rate, sigma, delta, eps_error=1e-3, delta_error=delta / 1000)


def _opacus(name: str, rounds: int, rate: float, sigma: float, delta: float, **options: float):
    from opacus.accountants import create_accountant

    accountant = create_accountant(name)
    accountant.history = [(sigma, rate, rounds)]
    return float(accountant.get_epsilon(delta=delta, **options))


def prv_upper(rounds: int, rate: float, sigma: float, delta: float) -> float:
    """The upper bound of `prv_accountant`."""
    return _prv(rounds, rate, sigma, delta)[2]


def prv_lower(rounds: int, rate: float, sigma: float, delta: float) -> float:
    """The lower bound of `prv_accountant`: no true bound may be below it."""
    return _prv(rounds, rate, sigma, delta)[0]


def _prv(rounds: int, rate: float, sigma: float, delta: float) -> tuple[float, float, float]:
    from prv_accountant.dpsgd import DPSGDAccountant

    accountant = DPSGDAccountant(
        noise_multiplier=sigma,
        sampling_probability=rate,
        max_steps=rounds,
        eps_error=1e-3,
        delta_error=delta / 1000,
    )
    return accountant.compute_epsilon(delta=delta, num_steps=rounds)


def _event(rounds: int, rate: float, sigma: float):
    import dp_accounting

    sampled = dp_accounting.PoissonSampledDpEvent(rate, dp_accounting.GaussianDpEvent(sigma))
    return dp_accounting.SelfComposedDpEvent(sampled, rounds)


#: By name: the distribution that must be installed, and the accountant.
ACCOUNTANTS: dict[str, tuple[str, Accountant]] = {
    "dp_accounting, PLD": ("dp-accounting", dp_accounting_pld),
    "dp_accounting, RDP": ("dp-accounting", dp_accounting_rdp),
    "jax-privacy, PLD": ("jax-privacy", jax_privacy_pld),
    "opacus, RDP": ("opacus", opacus_rdp),
    "opacus, PRV": ("opacus", opacus_prv),
    "prv_accountant, upper": ("prv-accountant", prv_upper),
    "prv_accountant, lower": ("prv-accountant", prv_lower),
}


def installed() -> dict[str, str]:
    """Returns the version of the distribution of each accountant that is installed."""
    versions = {}
    for name, (distribution, _) in ACCOUNTANTS.items():
        try:
            versions[name] = f"{distribution} {importlib.metadata.version(distribution)}"
        except importlib.metadata.PackageNotFoundError:
            logging.info("%s is not installed", distribution)
    return versions


def main(arguments: list[str] | None = None) -> None:
    """Writes the table of all accountants that are installed."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--output", type=pathlib.Path, required=True)
    path = parser.parse_args(arguments).output
    table = json.loads(path.read_text()) if path.exists() else {}
    for name, version in installed().items():
        values = []
        for mechanism in MECHANISMS:
            try:
                values.append(ACCOUNTANTS[name][1](*mechanism))
            except Exception as error:  # what an accountant refuses is part of the table
                values.append(f"{type(error).__name__}: {error}"[:200])
        table[name] = {"version": version, "epsilons": values}
        print(name, version, values)
    document = {**table, "mechanisms": [list(mechanism) for mechanism in MECHANISMS]}
    path.write_text(json.dumps(document, indent=1) + "\n")


if __name__ == "__main__":
    main()
