"""Pictures of plans. They need matplotlib, which the extra `plot` installs."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import numpy as np

from keras_bandmf._printed import rounded_down, rounded_up
from keras_bandmf.accounting.trade_off import largest_true_positive_rates
from keras_bandmf.audit.report import AuditReport
from keras_bandmf.audit.step_audit import claims_of
from keras_bandmf.planning.attacker import statement_trade_off
from keras_bandmf.planning.band_choice import BandChoice
from keras_bandmf.planning.plan import TrainingPlan
from keras_bandmf.planning.plan_table import rmse_unit
from keras_bandmf.planning.statement import Statement
from keras_bandmf.strategies import Strategy, ToeplitzStrategy

if TYPE_CHECKING:  # Everything but pictures works without matplotlib.
    from matplotlib.axes import Axes
    from matplotlib.colors import SymLogNorm
    from matplotlib.figure import Figure

__all__ = ["plot_audit", "plot_epsilon", "plot_plan", "plot_strategy", "plot_trade_off"]

_BLUE, _GREY = "#1f5fa8", "#8a8a8a"
_COLORS = {"cyclic_poisson": _BLUE, "random_allocation": "#7b4ea3", "fixed_order": "#3a9a5c"}
_HOW = {
    "cyclic_poisson": "Poisson sampling",
    "random_allocation": "random allocation",
    "fixed_order": "fixed order",
}
# The deltas whose epsilons bound the picture of an audit, beside the plan's own.
_MAX_POINTS = 2000
_MAX_STEPS = 10**8  # The most steps that `per_step_error` accepts.
_MAX_MATRIX_STEPS = 2_048  # A picture of more rows would show no single one.
_EPSILONS = 25  # Each takes an accounting of its own.


def plot_plan(
    plan: TrainingPlan,
    choice: BandChoice | None = None,
    path: str | os.PathLike[str] | None = None,
) -> Figure:
    """Draws a plan against DP-SGD: error by number of bands, and error of each step.

    The first panel shows the expected root mean squared error (RMSE) for each number of bands in
    `choice`. The second shows the RMSE of the noise at each step, for the plan and for DP-SGD.

    Args:
        plan: the plan.
        choice: the numbers of bands that `keras_bandmf.compare_bands` compared at the plan's
            (epsilon, delta), at least under the plan's sampling. None leaves out the first panel,
            and the second then shows DP-SGD at the plan's own noise multiplier.
        path: the file to which the picture is saved, in the format of its extension (.png, .pdf,
            .svg). None saves nothing.

    Returns:
        A `matplotlib.figure.Figure`.

    Raises:
        ImportError: if matplotlib is not installed.
        TypeError: if `plan` is not a `TrainingPlan`.
        ValueError: if `choice` does not have the plan's sampling, or if the plan has more than 10^8
            steps.

    Example:
        >>> import keras_bandmf as bandmf
        >>> from keras_bandmf.plots import plot_plan
        >>> plan = bandmf.TrainingPlan(
        ...     num_examples=1000, batch_size=100, epochs=2, num_bands=4,
        ...     noise_multiplier=1.0, delta=1e-5)
        >>> figure = plot_plan(plan)
        >>> figure.axes[0].get_xlabel()
        'step'
    """
    if not isinstance(plan, TrainingPlan):
        raise TypeError(f"Expected `plan` to be a TrainingPlan. Received: plan={plan!r}.")
    if choice is not None and plan.sampling not in choice.curves:
        raise ValueError(
            f"Expected `choice` to compare bands under sampling={plan.sampling!r}, as in the "
            f"plan. Received: {sorted(choice.curves)}. Compare the bands for the plan's arguments."
        )
    figure = _new_figure(panels=1 if choice is None else 2)
    axes = list(figure.axes)
    if choice is not None:
        _draw_choice(axes.pop(0), plan, choice)
    _draw_steps(axes.pop(0), plan, choice)
    figure.suptitle(
        f"{plan.num_steps:,} steps, batch {plan.batch_size:,} of {plan.num_examples:,}, "
        f"{_HOW[plan.sampling]}, "
        f"epsilon = {rounded_up(plan.epsilon(), 3)}, delta = {rounded_up(plan.delta, 2)}",
        fontsize=11,
    )
    return _saved(figure, path)


def plot_audit(
    report: AuditReport,
    plan: TrainingPlan,
    path: str | os.PathLike[str] | None = None,
) -> Figure:
    """Draws how well an attack did beside what the plan allows any attack.

    Both panels show the true-positive rate of the attack at each false-positive rate, the second on
    logarithmic axes, where small false-positive rates are seen. No attack on the plan can be above
    the shaded limit in expectation: for each of several deltas with the epsilon of the plan at it,
    `TPR <= e^epsilon FPR + delta` and `1 - FPR <= e^epsilon (1 - TPR) + delta`. The curve
    of the attack itself is measured on few canaries, and may cross the limit by chance; what is
    proved, with the stated confidence, is the lower bound in the title.

    Args:
        report: What an audit of the plan found.
        plan: The plan.
        path: The file to which the picture is saved, in the format of its extension (.png, .pdf,
            .svg). None saves nothing.

    Returns:
        A `matplotlib.figure.Figure`.

    Raises:
        ImportError: If matplotlib is not installed.
        TypeError: If an argument is of the wrong type.

    Example:
        >>> import numpy as np
        >>> import keras_bandmf as bandmf
        >>> from keras_bandmf.plots import plot_audit
        >>> plan = bandmf.TrainingPlan(
        ...     num_examples=1000, batch_size=100, epochs=2, num_bands=4,
        ...     noise_multiplier=1.0, delta=1e-5)
        >>> report = bandmf.audit.AuditReport(
        ...     kind="step", attack="matched filter", epsilon_lower_bound=1.5,
        ...     epsilon=plan.epsilon(), delta=plan.delta, confidence=0.95,
        ...     scores_in=np.array([1.0, 2.0]), scores_out=np.array([0.0, 1.0]))
        >>> plot_audit(report, plan).axes[0].get_ylabel()
        'true-positive rate'
    """
    if not isinstance(report, AuditReport):
        raise TypeError(f"Expected `report` to be an AuditReport. Received: report={report!r}.")
    if not isinstance(plan, TrainingPlan):
        raise TypeError(f"Expected `plan` to be a TrainingPlan. Received: plan={plan!r}.")
    figure = _new_figure(panels=2)
    linear, logarithmic = figure.axes
    rates, found = report.roc()
    least = 0.5 / max(len(report.scores_out), len(report.scores_in))
    grid = np.union1d(np.geomspace(least, 1.0, 400), np.linspace(0.0, 1.0, 400))
    limit = largest_true_positive_rates(claims_of(plan), grid)
    for axis in (linear, logarithmic):
        axis.fill_between(grid, limit, 1.0, color=_GREY, alpha=0.25, linewidth=0)
        axis.plot(grid, limit, color=_GREY, label="limit of the plan")
        axis.step(rates, found, where="post", color=_BLUE, label="the attack")
        axis.plot(grid, grid, ":", color="black", linewidth=1, label="guessing")
        axis.set_xlabel("false-positive rate")
        axis.set_ylabel("true-positive rate")
    linear.set(xlim=(0, 1), ylim=(0, 1), title="All canaries")
    logarithmic.set(xscale="log", yscale="log", xlim=(least, 1), ylim=(least, 1))
    logarithmic.set_title("Few false alarms")
    linear.legend(frameon=False, loc="lower right")
    figure.suptitle(
        f"Audit ({report.kind}): epsilon is at least {rounded_down(report.epsilon_lower_bound, 3)} "
        f"with confidence {rounded_down(100 * report.confidence, 4)} %; "
        f"the plan states {rounded_up(report.epsilon, 3)} at delta = {rounded_up(report.delta, 2)}",
        fontsize=11,
    )
    return _saved(figure, path)


def plot_trade_off(
    source: TrainingPlan | Statement, path: str | os.PathLike[str] | None = None
) -> Figure:
    """Draws what an attacker can do at most: true-positive by false-positive rates.

    The curve is beside those of no privacy (every attack is always right) and of perfect privacy
    (every attack guesses).

    Formal guarantees: no attacker is above the curve; see `accounting.trade_off.TradeOff`.

    Args:
        source: the plan, or the statement of a plan, of a run or of several runs.
        path: the file to which the picture is saved. None saves nothing.

    Returns:
        A `matplotlib.figure.Figure`.

    Raises:
        ImportError: if matplotlib is not installed.
        TypeError: if `source` is neither a plan nor a statement.
        ValueError: if `source` is not private, or has no events.

    Example:
        >>> import keras_bandmf as bandmf
        >>> from keras_bandmf.plots import plot_trade_off
        >>> plan = bandmf.TrainingPlan(
        ...     num_examples=1000, batch_size=100, epochs=2, num_bands=4,
        ...     noise_multiplier=1.0, delta=1e-5)
        >>> plot_trade_off(plan).axes[0].get_xlabel()
        'false-positive rate'
    """
    statement = source.statement() if isinstance(source, TrainingPlan) else source
    if not isinstance(statement, Statement):
        raise TypeError(
            f"Expected `source` to be a TrainingPlan or a Statement. Received: source={source!r}."
        )
    known = statement_trade_off(statement) if statement.private else None
    if known is None:
        raise ValueError(
            "Expected `source` to be private, and to say what its epsilon covers. Received: "
            f"private={statement.private}, epsilon={statement.epsilon}, "
            f"events={statement.events}. Use a plan with noise and at least one step."
        )
    figure = _new_figure(panels=1)
    (axis,) = figure.axes
    rates = np.geomspace(1e-4, 1.0, 400)
    bounds = [known[0].true_positive_rate(rate) for rate in rates]
    axis.plot(rates, np.ones_like(rates), ":", color=_GREY, label="no privacy")
    axis.plot(rates, bounds, color=_BLUE, label="at most, for this guarantee")
    axis.plot(rates, rates, "--", color=_GREY, label="perfect privacy")
    axis.set_xscale("log")
    axis.set_xlabel("false-positive rate")
    axis.set_ylabel("true-positive rate of an attacker")
    axis.set_title(
        f"epsilon = {rounded_up(statement.epsilon, 3)} at delta = {rounded_up(statement.delta, 2)}",
        fontsize=10,
    )
    axis.legend(frameon=False)
    return _saved(figure, path)


def plot_epsilon(plan: TrainingPlan, path: str | os.PathLike[str] | None = None) -> Figure:
    """Draws the epsilon of the steps taken so far, as `plan.epsilon(steps)` says it.

    It shows progress: a run that ends early is charged in full.

    Args:
        plan: the plan; with noise.
        path: the file to which the picture is saved. None saves nothing.

    Returns:
        A `matplotlib.figure.Figure`.

    Raises:
        ImportError: if matplotlib is not installed.
        TypeError: if `plan` is not a `TrainingPlan`.
        ValueError: if the plan has no noise.

    Example:
        >>> import keras_bandmf as bandmf
        >>> from keras_bandmf.plots import plot_epsilon
        >>> plan = bandmf.TrainingPlan(
        ...     num_examples=1000, batch_size=100, epochs=2, num_bands=4,
        ...     noise_multiplier=1.0, delta=1e-5)
        >>> plot_epsilon(plan).axes[0].get_xlabel()
        'step'
    """
    if not isinstance(plan, TrainingPlan):
        raise TypeError(f"Expected `plan` to be a TrainingPlan. Received: plan={plan!r}.")
    if plan.noise_multiplier == 0.0:
        raise ValueError(
            "Expected a plan with noise, because epsilon is infinite without. Received: "
            "noise_multiplier=0.0. Use `TrainingPlan.calibrate`, which finds it."
        )
    figure = _new_figure(panels=1)
    (axis,) = figure.axes
    steps = np.unique(np.linspace(1, plan.num_steps, _EPSILONS).astype(int))
    values = [plan.epsilon(int(step)) for step in steps]
    axis.plot([0, *steps], [0.0, *values], color=_BLUE)
    axis.axhline(values[-1], color=_GREY, linestyle=":", label=f"all {plan.num_steps} steps")
    axis.set_ylim(bottom=0)
    axis.set_xlabel("step")
    axis.set_ylabel("epsilon")
    axis.set_title(
        f"Epsilon of the steps so far, at delta = {rounded_up(plan.delta, 2)}", fontsize=10
    )
    axis.legend(frameon=False, loc="lower right")
    return _saved(figure, path)


def plot_strategy(strategy: Strategy, path: str | os.PathLike[str] | None = None) -> Figure:
    """Draws a strategy as images: C, and its inverse, whose rows weight the noise of a step.

    Args:
        strategy: a strategy of at most 2,048 steps whose C is square.
        path: the file to which the picture is saved. None saves nothing.

    Returns:
        A `matplotlib.figure.Figure`.

    Raises:
        ImportError: if matplotlib is not installed.
        TypeError: if `strategy` is not a `Strategy`.
        ValueError: if it has more steps, or C is not square.

    Example:
        >>> import keras_bandmf as bandmf
        >>> from keras_bandmf.plots import plot_strategy
        >>> strategy = bandmf.strategies.ToeplitzStrategy.optimize(num_steps=20, num_bands=4)
        >>> [axis.get_title() for axis in plot_strategy(strategy).axes[:2]]
        ['C', 'its inverse']
    """
    if not isinstance(strategy, Strategy):
        raise TypeError(f"Expected `strategy` to be a Strategy. Received: strategy={strategy!r}.")
    if strategy.num_steps > _MAX_MATRIX_STEPS:
        raise ValueError(
            f"Expected at most {_MAX_MATRIX_STEPS} steps for a picture of a matrix. Received: "
            f"num_steps={strategy.num_steps}. Optimize one of the same bands for fewer steps."
        )
    matrix = strategy.materialize()
    if matrix.shape[0] != matrix.shape[1]:
        raise ValueError(
            f"Expected a square matrix. Received: {type(strategy).__name__}, of shape "
            f"{matrix.shape}."
        )
    figure = _new_figure(panels=2)
    names = ("C", "its inverse")
    for axis, name, values in zip(figure.axes, names, (matrix, np.linalg.inv(matrix)), strict=True):
        # Small entries far from the diagonal would be white on a linear scale.
        largest = float(np.max(np.abs(values)))
        image = axis.imshow(
            values, cmap="RdBu_r", norm=_around_zero(largest), interpolation="nearest"
        )
        axis.grid(visible=False)
        axis.set_title(name, fontsize=10)
        axis.set_xlabel("step of the noise")
        axis.set_ylabel("step")
        figure.colorbar(image, ax=axis, shrink=0.8)
    return _saved(figure, path)


def _around_zero(largest: float) -> SymLogNorm:
    """Returns a scale that is linear near zero and logarithmic beyond."""
    from matplotlib.colors import SymLogNorm

    return SymLogNorm(linthresh=1e-2 * largest, vmin=-largest, vmax=largest)


def require_matplotlib() -> None:
    """Does nothing where pictures can be drawn.

    Raises:
        ImportError: If matplotlib is not installed.

    Example:
        >>> from keras_bandmf.plots import require_matplotlib
        >>> require_matplotlib()
    """
    try:
        import matplotlib.figure  # noqa: F401
        import matplotlib.layout_engine  # noqa: F401
    except ImportError as error:
        raise ImportError(
            "Expected matplotlib to be installed: plots need it. Install the extra: "
            "`pip install keras_bandmf[plot]`."
        ) from error


def _new_figure(panels: int) -> Figure:
    """Returns a figure with this number of empty panels in a row."""
    require_matplotlib()
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    # Not pyplot's figure, which would open windows and keep global state.
    layout = ConstrainedLayoutEngine(wspace=0.06)
    figure = Figure(figsize=(5.4 * panels, 4.0), layout=layout)
    for axis in np.ravel(figure.subplots(1, panels)):
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(alpha=0.3, linewidth=0.6)
    return figure


def _saved(figure: Figure, path: str | os.PathLike[str] | None) -> Figure:
    """Returns a figure, and writes it where there is a path."""
    if path is not None:
        figure.savefig(path, dpi=150)
    return figure


def _draw_choice(axis: Axes, plan: TrainingPlan, choice: BandChoice) -> None:
    """Draws the expected RMSE over the number of bands, a curve for each sampling."""
    rows = choice.candidates
    for sampling, curve in choice.curves.items():
        bands = [row.num_bands for row in curve.candidates]
        values = [row.expected_rmse for row in curve.candidates]
        axis.plot(bands, values, "o-", color=_COLORS[sampling], markersize=4, label=_HOW[sampling])
    axis.plot(1, choice.dp_sgd.expected_rmse, "s", color=_GREY, label="1: DP-SGD")
    axis.plot(
        plan.num_bands,
        plan.expected_rmse,
        "*",
        color="#d1495b",
        markersize=15,
        label=f"{plan.num_bands}: this plan",
    )
    axis.set_xscale("log", base=2)
    powers = [2**power for power in range(max(row.num_bands for row in rows).bit_length())]
    axis.set_xticks(powers, [str(power) for power in powers])
    axis.set_ylim(0, 1.08 * max(row.expected_rmse for row in rows))
    axis.set_xlabel("number of bands")
    axis.set_ylabel(f"expected RMSE ({rmse_unit(plan.workload)})")
    axis.set_title("Which number of bands", fontsize=10)
    axis.legend(frameon=False)


def _draw_steps(axis: Axes, plan: TrainingPlan, choice: BandChoice | None) -> None:
    """Draws the RMSE of the noise at each step, for the plan and for DP-SGD."""
    if plan.num_steps > _MAX_STEPS:
        raise ValueError(
            f"Expected at most {_MAX_STEPS} steps for a picture of the errors of steps. Received: "
            f"num_steps={plan.num_steps}. Plan fewer steps."
        )
    stride = max(1, plan.num_steps // _MAX_POINTS)
    steps = np.arange(1, plan.num_steps + 1)[::stride]
    scale = plan.sensitivity / plan.schedule.expected_participations
    # DP-SGD under the sampling of the plan, so that `scale` holds for both.
    peer = None if choice is None else choice.curves[plan.sampling].dp_sgd
    dp_sgd = plan.noise_multiplier if peer is None else peer.noise_multiplier
    one_band = ToeplitzStrategy(np.ones(1), plan.num_steps, workload=plan.workload)
    for name, strategy, sigma, color, line in (
        ("this plan", plan.strategy, plan.noise_multiplier, _BLUE, "-"),
        ("DP-SGD", one_band, dp_sgd, _GREY, "--"),
    ):
        errors = sigma * scale * np.sqrt(strategy.per_step_error()[::stride])
        label = _label(name, strategy.num_bands, sigma)
        axis.plot(steps, errors, color=color, linestyle=line, label=label)
    axis.set_ylim(bottom=0)
    axis.set_xlabel("step")
    what = "the sum of gradients" if plan.workload is None else "the weights"
    axis.set_ylabel(f"noise in {what}\n(RMSE, {rmse_unit(plan.workload)})")
    same = "epsilon" if choice is not None else "noise multiplier"
    axis.set_title(f"Error of every step, at the same {same}", fontsize=10)
    axis.legend(frameon=False)


def _label(name: str, bands: int, sigma: float) -> str:
    """Returns the text of a line in the legend."""
    return (
        f"{name}: {bands} band{'s' if bands > 1 else ''}, noise multiplier {rounded_down(sigma, 3)}"
    )
