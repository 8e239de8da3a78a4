"""TF Privacy's accountants as a second opinion on DP-SGD; the extra `tf-privacy` is optional."""

from __future__ import annotations

import decimal
import importlib
import importlib.util
import re
import sys
import types

_LIBRARY = "tensorflow_privacy.privacy.analysis.compute_dp_sgd_privacy_lib"
# Below this noise TF Privacy's loss distributions, on a fixed grid, take minutes and gigabytes.
_LEAST_NOISE_FOR_PLD = 0.3


def tf_privacy_epsilons(
    *,
    num_examples: int,
    batch_size: int,
    num_steps: int,
    noise_multiplier: float,
    delta: float,
) -> dict[str, float]:
    """Returns the epsilon of Poisson-sampled DP-SGD by `compute_dp_sgd_privacy_statement`.

    Args:
        num_examples: N.
        batch_size: The expected number of examples of a step.
        num_steps: t, the number of steps charged.
        noise_multiplier: sigma.
        delta: In (0, 1).

    Returns:
        Epsilon by accountant, rounded up from the three decimals TF Privacy prints; empty where
        the extra is not installed or there is no noise.
    """
    library = load(_LIBRARY)
    if library is None or noise_multiplier == 0:
        return {}
    # It charges ceil(epochs * N / batch): half a step less keeps rounding from adding one.
    epochs = (num_steps - 0.5) * batch_size / num_examples
    names = ["RDP"] if noise_multiplier < _LEAST_NOISE_FOR_PLD else ["PLD", "RDP"]
    return {
        f"TF Privacy, {name}": _epsilon_in(
            library.compute_dp_sgd_privacy_statement(
                num_examples,
                batch_size,
                epochs,
                noise_multiplier,
                delta,
                used_microbatching=False,
                accountant_type=library.AccountantType[name],
            )
        )
        for name in names
    }


def load(module: str) -> types.ModuleType | None:
    """Imports a module of TF Privacy, whose own switch keeps it from importing TF 1 code.

    Args:
        module: The name of the module.

    Returns:
        The module, or None where the extra is not installed.
    """
    if importlib.util.find_spec("tensorflow_privacy") is None:
        return None
    switch = "skip_tf_privacy_import"
    missing = object()
    before = getattr(sys, switch, missing)
    setattr(sys, switch, True)
    try:
        return importlib.import_module(module)
    finally:
        if before is missing:
            delattr(sys, switch)
        else:
            setattr(sys, switch, before)


def _epsilon_in(report: str) -> float:
    found = re.search(r"Epsilon assuming Poisson sampling \(\*\):\s+(\S+)", report)
    if found is None:
        raise ValueError(
            "Expected the report of TF Privacy 0.9. Received: "
            f"{report!r}. Install `tensorflow-privacy==0.9.0`."
        )
    # Printed to nearest: half a unit of its last decimal makes it an upper bound again.
    printed = decimal.Decimal(found.group(1))
    exponent = printed.as_tuple().exponent
    if not isinstance(exponent, int):
        return float(printed)  # infinite: no decimals
    return float(printed + decimal.Decimal((0, (5,), exponent - 1)))
