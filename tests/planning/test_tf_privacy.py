"""TF Privacy's accountants against ours, where the extra is installed, and how it is imported."""

import importlib.util
import sys
import types

import pytest

from keras_bandmf.accounting.accountant import FINITE_NOISE_SHARE, epsilon_of
from keras_bandmf.planning import tf_privacy
from keras_bandmf.planning.plan import TrainingPlan
from keras_bandmf.sampling.schedule import Schedule

needs_extra = pytest.mark.skipif(
    importlib.util.find_spec("tensorflow_privacy") is None,
    reason="the extra tf-privacy is not installed (it needs Python < 3.12 and NumPy 1)",
)
RUN = {"num_examples": 60_000, "batch_size": 600}


@needs_extra
@pytest.mark.parametrize(
    ("sigma", "num_steps", "delta"), [(0.9591, 1_000, 1e-5), (1.3, 333, 1e-7), (0.5, 1, 1e-5)]
)
def test_two_libraries_agree(sigma, num_steps, delta):
    run = Schedule("cyclic_poisson", 60_000, 600, num_steps, num_bands=1)
    ours = epsilon_of(run.dp_event(sigma), delta / (1 - FINITE_NOISE_SHARE))
    theirs = tf_privacy.tf_privacy_epsilons(
        **RUN, num_steps=num_steps, noise_multiplier=sigma, delta=delta
    )
    # They print three decimals. RDP is an upper bound on the same run.
    assert theirs["TF Privacy, PLD"] == pytest.approx(ours, abs=1.1e-3)
    assert ours - 1e-4 <= theirs["TF Privacy, RDP"]
    assert set(theirs) == {"TF Privacy, PLD", "TF Privacy, RDP"}


@needs_extra
def test_it_is_shown_in_the_statement_of_dp_sgd_alone():
    values = {**RUN, "num_steps": 100, "noise_multiplier": 1.0, "delta": 1e-5}
    dp_sgd = TrainingPlan(**values, num_bands=1)
    text = str(dp_sgd.statement())
    assert "by TF Privacy, PLD" in text
    assert "by TF Privacy, RDP" in text
    part = dp_sgd.statement(10).other_accountants["TF Privacy, PLD"]
    assert part == pytest.approx(dp_sgd.epsilon(10), abs=1.1e-3)
    assert dp_sgd.statement(0).other_accountants == {}
    for change in ({"num_bands": 4}, {"num_bands": 1, "sampling": "fixed_order"}):
        assert TrainingPlan(**{**values, **change}).statement().other_accountants == {}


@needs_extra
def test_little_noise_is_left_to_rdp():
    theirs = tf_privacy.tf_privacy_epsilons(**RUN, num_steps=10, noise_multiplier=0.1, delta=1e-5)
    assert set(theirs) == {"TF Privacy, RDP"}
    assert (
        tf_privacy.tf_privacy_epsilons(**RUN, num_steps=10, noise_multiplier=0.0, delta=1e-5) == {}
    )


@needs_extra
def test_the_switch_is_put_back(monkeypatch):
    monkeypatch.delattr(sys, "skip_tf_privacy_import", raising=False)
    tf_privacy.tf_privacy_epsilons(**RUN, num_steps=1, noise_multiplier=2.0, delta=1e-5)
    assert not hasattr(sys, "skip_tf_privacy_import")
    monkeypatch.setattr(sys, "skip_tf_privacy_import", "mine", raising=False)
    tf_privacy.tf_privacy_epsilons(**RUN, num_steps=1, noise_multiplier=2.0, delta=1e-5)
    assert sys.skip_tf_privacy_import == "mine"


def test_the_switch_is_set_during_the_import_and_put_back_after_a_failure(monkeypatch):
    seen = []

    def fail(name):
        seen.append((name, sys.skip_tf_privacy_import))
        raise RuntimeError("broken")

    monkeypatch.delattr(sys, "skip_tf_privacy_import", raising=False)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: types.SimpleNamespace())
    monkeypatch.setattr(importlib, "import_module", fail)
    with pytest.raises(RuntimeError, match="broken"):
        tf_privacy.tf_privacy_epsilons(**RUN, num_steps=1, noise_multiplier=2.0, delta=1e-5)
    assert seen == [("tensorflow_privacy.privacy.analysis.compute_dp_sgd_privacy_lib", True)]
    assert not hasattr(sys, "skip_tf_privacy_import")


def test_without_the_extra_there_is_no_second_number(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    values = {"num_steps": 1, "noise_multiplier": 2.0, "delta": 1e-5}
    assert tf_privacy.tf_privacy_epsilons(**RUN, **values) == {}
    plan = TrainingPlan(**RUN, **values, num_bands=1)
    assert plan.statement().other_accountants == {}


def test_an_unknown_report_is_an_error():
    with pytest.raises(ValueError, match="tensorflow-privacy==0.9.0"):
        tf_privacy._epsilon_in("Epsilon is 3")
