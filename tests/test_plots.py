"""Plots: what is drawn, what is saved, and the message without matplotlib."""

import builtins

import numpy as np
import pytest

from keras_bandmf.band_choice import BandCandidate, BandChoice
from keras_bandmf.plan import TrainingPlan
from keras_bandmf.plots import plot_plan
from tests.planning import make_plan


@pytest.fixture(scope="module")
def plan():
    return make_plan()


@pytest.fixture(scope="module")
def choice(plan):
    rows = [(1, 1.0, 2.0), (4, 1.5, plan.expected_rmse)]
    return BandChoice(tuple(BandCandidate("cyclic_poisson", *row, None) for row in rows))


def test_both_panels_are_drawn_and_saved(plan, choice, tmp_path):
    pytest.importorskip("matplotlib")
    path = tmp_path / "plan.png"
    left, right = plot_plan(plan, choice, path).axes
    assert path.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    curve, dp_sgd, star = left.get_lines()
    np.testing.assert_allclose(curve.get_ydata(), [2.0, plan.expected_rmse])
    assert (dp_sgd.get_xdata()[0], star.get_xdata()[0]) == (1, 4)
    assert star.get_ydata()[0] == plan.expected_rmse
    ours, theirs = right.get_lines()
    dense = plan.strategy.materialize()
    error = np.sum((np.tril(np.ones((60, 60))) @ np.linalg.inv(dense)) ** 2, axis=1)
    np.testing.assert_allclose(ours.get_ydata(), 1.5 * np.sqrt(error) / 3, rtol=1e-9)
    np.testing.assert_allclose(theirs.get_ydata(), np.sqrt(np.arange(1, 61)) / 3, rtol=1e-12)
    for axis in (left, right):
        assert axis.get_xlabel()
        assert "clip norms" in axis.get_ylabel()


def test_one_panel_without_a_comparison(plan):
    pytest.importorskip("matplotlib")
    (axis,) = plot_plan(plan).axes
    assert "same noise multiplier" in axis.get_title()


def test_long_runs_are_thinned():
    pytest.importorskip("matplotlib")
    long = TrainingPlan(
        num_examples=10**6,
        batch_size=1_000,
        num_steps=9_999,
        noise_multiplier=1.0,
        delta=1e-7,
        num_bands=1,
    )
    (axis,) = plot_plan(long).axes
    for line in axis.get_lines():
        assert 2_000 <= len(line.get_xdata()) <= 4_000
        assert line.get_ydata()[-1] == pytest.approx(np.sqrt(line.get_xdata()[-1]) / 9.999)


def test_without_matplotlib(plan, monkeypatch):
    real = builtins.__import__

    def without(name, *arguments, **options):
        if name.startswith("matplotlib"):
            raise ModuleNotFoundError(name)
        return real(name, *arguments, **options)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ImportError, match=r"pip install keras_bandmf\[plot\]"):
        plot_plan(plan)


def test_only_plans_are_drawn():
    with pytest.raises(TypeError, match="plan='x'"):
        plot_plan("x")
