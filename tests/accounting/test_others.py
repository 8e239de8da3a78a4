"""Our epsilon against other accountants: the checked-in table, and those that can be imported."""

import importlib.util
import json
import pathlib
import sys

import pytest

from keras_bandmf.accounting.accountant import FINITE_NOISE_SHARE, epsilon_of
from keras_bandmf.accounting.composition import dp_event
from keras_bandmf.planning.tf_privacy import tf_privacy_epsilons

FOLDER = pathlib.Path(__file__).parents[2] / "benchmarks"
TABLE = json.loads((FOLDER / "accountants.json").read_text())
NAMES = sorted(set(TABLE) - {"mechanisms"})
MECHANISMS = [tuple(each) for each in TABLE["mechanisms"]]
#: By how much an upper bound of theirs may be below ours, and above: RDP is a looser bound, and the
#: bounds of PRV accountants are apart by twice the error that they are asked for, 10^-3.
ALLOWED = {
    "dp_accounting, RDP": (0.0, 0.7),
    "opacus, RDP": (0.0, 0.7),
    "opacus, PRV": (0.0, 2.5e-3),
    "prv_accountant, upper": (0.0, 2.5e-3),
    "prv_accountant, lower": (2.5e-3, 0.0),
}


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("accountants", FOLDER / "accountants.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def ours(mechanism):
    rounds, rate, sigma, delta = mechanism
    # All of delta: the others know no finite noise.
    return epsilon_of(dp_event((rounds, rate, sigma)), delta / (1 - FINITE_NOISE_SHARE))


@pytest.mark.parametrize("name", NAMES)
def test_the_table(name):
    below, above = ALLOWED.get(name, (1e-3, 1e-3))
    for mechanism, theirs in zip(MECHANISMS, TABLE[name]["epsilons"], strict=True):
        assert -below <= theirs - ours(mechanism) <= above, (name, mechanism)


def test_ours_is_on_the_safe_side_of_a_true_lower_bound():
    for mechanism, least in zip(
        MECHANISMS, TABLE["prv_accountant, lower"]["epsilons"], strict=True
    ):
        assert ours(mechanism) >= least


def test_what_can_be_imported_gives_the_table(script):
    assert list(script.MECHANISMS) == MECHANISMS
    available = set(script.installed())
    assert "dp_accounting, PLD" in available
    for name in available:
        for mechanism, kept in zip(MECHANISMS, TABLE[name]["epsilons"], strict=True):
            assert script.ACCOUNTANTS[name][1](*mechanism) == pytest.approx(kept, rel=1e-4)


# Importing it by itself fails on new TensorFlow; `tf_privacy_epsilons` knows its switch.
@pytest.mark.skipif(
    importlib.util.find_spec("tensorflow_privacy") is None, reason="TF Privacy is not installed"
)
def test_tf_privacy():
    theirs = tf_privacy_epsilons(
        num_examples=1_000, batch_size=10, num_steps=900, noise_multiplier=0.8, delta=1e-6
    )
    assert theirs["TF Privacy, PLD"] == pytest.approx(ours((900, 0.01, 0.8, 1e-6)), abs=2e-3)
