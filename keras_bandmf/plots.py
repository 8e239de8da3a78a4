"""Pictures of plans; needs the extra `plot` (matplotlib)."""

from __future__ import annotations

import os
from typing import Any

import numpy as np

from keras_bandmf._printed import rounded_down, rounded_up
from keras_bandmf.planning.band_choice import BandChoice
from keras_bandmf.planning.plan import TrainingPlan
from keras_bandmf.planning.plan_table import rmse_unit
from keras_bandmf.strategies import ToeplitzStrategy

_BLUE, _GREY = "#1f5fa8", "#8a8a8a"
_COLORS = {"cyclic_poisson": _BLUE, "fixed_order": "#3a9a5c"}
_HOW = {"cyclic_poisson": "Poisson sampling", "fixed_order": "fixed order"}
_MAX_POINTS = 2000
_MAX_STEPS = 10**8  # per_step_error is refused above


def plot_plan(
    plan: TrainingPlan, choice: BandChoice | None = None, path: str | os.PathLike | None = None
) -> Any:
    """Draws a plan: RMSE over the number of bands, and the error of every step, against DP-SGD.

    Args:
        plan: the plan.
        choice: the numbers of bands compared at the plan's (epsilon, delta), from
            `keras_bandmf.compare_bands`, under the plan's sampling at least; without it only the
            errors of the steps are drawn, DP-SGD's at the plan's own noise multiplier.
        path: where to save the picture, by its extension (.png, .pdf, .svg); None saves nothing.

    Returns:
        A `matplotlib.figure.Figure`.

    Raises:
        ImportError: if matplotlib is not installed.
        TypeError: if `plan` is not a `TrainingPlan`.
        ValueError: if `choice` is of another sampling than the plan.
    """
    if not isinstance(plan, TrainingPlan):
        raise TypeError(f"Expected `plan` to be a TrainingPlan. Received: plan={plan!r}.")
    if choice is not None and plan.sampling not in choice.curves:
        raise ValueError(
            f"Expected `choice` to compare bands under sampling={plan.sampling!r}, that of the "
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
    if path is not None:
        figure.savefig(path, dpi=150)
    return figure


def _new_figure(panels: int) -> Any:
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError(
            "Plots need matplotlib, which is not installed. Install the extra: "
            "`pip install keras_bandmf[plot]`."
        ) from error
    # A Figure of its own, not pyplot's: no window, no global state.
    figure = Figure(figsize=(5.4 * panels, 4.0), layout="constrained")
    figure.get_layout_engine().set(wspace=0.06)
    for axis in np.ravel(figure.subplots(1, panels)):
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(alpha=0.3, linewidth=0.6)
    return figure


def _draw_choice(axis: Any, plan: TrainingPlan, choice: BandChoice) -> None:
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


def _draw_steps(axis: Any, plan: TrainingPlan, choice: BandChoice | None) -> None:
    if plan.num_steps > _MAX_STEPS:
        raise ValueError(
            f"Per-step errors are drawn up to {_MAX_STEPS} steps. Received: "
            f"num_steps={plan.num_steps}. Plan fewer steps."
        )
    stride = max(1, plan.num_steps // _MAX_POINTS)
    steps = np.arange(1, plan.num_steps + 1)[::stride]
    participations = plan.num_steps * plan.batch_size / plan.num_examples
    scale = plan.sensitivity / participations
    # DP-SGD under the sampling of the plan, so that `scale` is that of both.
    peer = None if choice is None else choice.curves[plan.sampling].dp_sgd
    dp_sgd = plan.noise_multiplier if peer is None else peer.noise_multiplier
    one_band = ToeplitzStrategy([1.0], plan.num_steps, workload=plan.workload)
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
    return (
        f"{name}: {bands} band{'s' if bands > 1 else ''}, noise multiplier {rounded_down(sigma, 3)}"
    )
