"""Plots: what is drawn, what is saved, and the message without matplotlib."""

import builtins

import numpy as np
import pytest
import scipy.stats

from keras_bandmf.audit import AuditReport
from keras_bandmf.planning.band_choice import BandCandidate, BandChoice
from keras_bandmf.planning.plan import TrainingPlan
from keras_bandmf.plots import plot_audit, plot_epsilon, plot_plan, plot_strategy, plot_trade_off
from keras_bandmf.strategies import ToeplitzStrategy, Workload
from tests.plans import make_plan


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


def test_both_samplings_and_a_workload():
    pytest.importorskip("matplotlib")
    fixed = make_plan(sampling="fixed_order", workload=Workload(60, 0.5, momentum=0.5))
    rows = [("cyclic_poisson", 1, 1.0, 2.0), ("fixed_order", 1, 3.0, 4.0)]
    choice = BandChoice(tuple(BandCandidate(*row, None) for row in rows))
    left, right = plot_plan(fixed, choice).axes
    names = [text.get_text() for text in left.get_legend().get_texts()]
    assert names == ["Poisson sampling", "fixed order", "1: DP-SGD", "4: this plan"]
    # DP-SGD in the plan's own sampling, under its workload.
    kernel = 0.5 * (1 - 0.5 ** np.arange(1, 61)) / 0.5
    expected = 3.0 * np.sqrt(3) / 3 * np.sqrt(np.cumsum(kernel**2))
    np.testing.assert_allclose(right.get_lines()[1].get_ydata(), expected, rtol=1e-9)
    assert "clip norms x learning rate" in left.get_ylabel() and "weights" in right.get_ylabel()
    with pytest.raises(ValueError, match="sampling='fixed_order'"):
        plot_plan(fixed, choice.curves["cyclic_poisson"])


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


def report_of(plan):
    rng = np.random.default_rng(0)
    return AuditReport(
        kind="step",
        attack="matched filter",
        epsilon_lower_bound=0.51239,
        epsilon=plan.epsilon(),
        delta=plan.delta,
        confidence=0.95,
        scores_in=rng.normal(size=300) + 0.5,
        scores_out=rng.normal(size=400),
    )


def test_an_audit_is_drawn_beside_what_the_plan_allows(tmp_path):
    pytest.importorskip("matplotlib")
    # One participation and a fixed order: the limit is that of a Gaussian of mean 1 / sigma.
    plan = make_plan(sampling="fixed_order", epochs=1)
    report, path = report_of(plan), tmp_path / "audit.png"
    figure = plot_audit(report, plan, path)
    assert path.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    assert "at least 0.512 with" in figure.get_suptitle()
    for axis in figure.axes:
        limit, attack, guess = axis.get_lines()
        false = limit.get_xdata()
        best = scipy.stats.norm.cdf(scipy.stats.norm.ppf(false) + 1 / plan.noise_multiplier)
        assert (limit.get_ydata() >= best - 1e-12).all()
        assert (limit.get_ydata() - best).max() < 0.03
        np.testing.assert_array_equal(attack.get_data(), report.roc())
        np.testing.assert_array_equal(*guess.get_data())
    assert figure.axes[1].get_xscale() == "log"


def test_an_audit_of_a_plan_without_noise_allows_everything():
    pytest.importorskip("matplotlib")
    plan = make_plan(noise_multiplier=0.0)
    (limit, *_), _ = (axis.get_lines() for axis in plot_audit(report_of(plan), plan).axes)
    false, true = limit.get_data()
    assert (true[false > 0] == 1).all()


def test_audits_of_something_else_are_refused(plan):
    with pytest.raises(TypeError, match="AuditReport"):
        plot_audit(None, plan)
    with pytest.raises(TypeError, match="TrainingPlan"):
        plot_audit(report_of(plan), plan.to_json())


def test_the_trade_off_is_between_no_and_perfect_privacy(plan, tmp_path):
    pytest.importorskip("matplotlib")
    (axis,) = plot_trade_off(plan, tmp_path / "curve.png").axes
    nothing, bound, perfect = (line.get_ydata() for line in axis.get_lines())
    assert np.all(perfect <= bound) and np.all(bound <= nothing) and np.all(np.diff(bound) >= 0)
    assert (tmp_path / "curve.png").read_bytes()[:4] == b"\x89PNG"
    (again,) = plot_trade_off(plan.statement()).axes
    np.testing.assert_array_equal(again.get_lines()[1].get_ydata(), bound)
    with pytest.raises(ValueError, match="private"):
        plot_trade_off(make_plan(noise_multiplier=0.0))
    with pytest.raises(TypeError, match="source"):
        plot_trade_off(None)


def test_epsilon_grows_to_that_of_the_plan(plan, tmp_path):
    pytest.importorskip("matplotlib")
    figure = plot_epsilon(plan, tmp_path / "epsilon.png")
    curve, limit = figure.axes[0].get_lines()
    steps, values = curve.get_data()
    assert (steps[0], values[0], steps[-1]) == (0, 0.0, plan.num_steps)
    assert list(values) == sorted(values)
    assert values[-1] == limit.get_ydata()[0] == plan.epsilon()
    assert values[5] == plan.epsilon(int(steps[5]))
    assert (tmp_path / "epsilon.png").stat().st_size > 5_000


def test_a_strategy_is_drawn_as_it_is(tmp_path):
    pytest.importorskip("matplotlib")
    strategy = ToeplitzStrategy.optimize(num_steps=12, num_bands=3)
    figure = plot_strategy(strategy, tmp_path / "strategy.png")
    dense = strategy.materialize()
    shown = [axis.images[0].get_array() for axis in figure.axes[:2]]
    np.testing.assert_array_equal(shown[0], dense)
    np.testing.assert_allclose(shown[0] @ shown[1], np.eye(12), atol=1e-12)
    assert (tmp_path / "strategy.png").stat().st_size > 5_000


@pytest.mark.parametrize(
    ("draw", "error", "message"),
    [
        (lambda: plot_epsilon("plan"), TypeError, "plan='plan'"),
        (lambda: plot_epsilon(make_plan(noise_multiplier=0.0)), ValueError, "with noise"),
        (lambda: plot_strategy(None), TypeError, "strategy=None"),
        (
            lambda: plot_strategy(ToeplitzStrategy(np.ones(1), 3_000)),
            ValueError,
            "at most 2048 steps",
        ),
    ],
)
def test_what_cannot_be_drawn(draw, error, message):
    with pytest.raises(error, match=message):
        draw()
