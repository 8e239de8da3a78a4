"""Pictures of plans; needs the extra `plot` (matplotlib)."""

from __future__ import annotations

import os
from typing import Any

import numpy as np

from keras_bandmf.band_choice import BandChoice
from keras_bandmf.plan import TrainingPlan

_BLUE, _GREY = "#1f5fa8", "#8a8a8a"
_MAX_POINTS = 2000
_MAX_STEPS = 10**8  # per_step_error is refused above


def plot_plan(
    plan: TrainingPlan, choice: BandChoice | None = None, path: str | os.PathLike | None = None
) -> Any:
    """Draws a plan: RMSE over the number of bands, and the error of every step, against DP-SGD.

    Args:
        plan: the plan.
        choice: the numbers of bands compared at the plan's (epsilon, delta), from
            `band_choice.choose_bands`; without it only the errors of the steps are drawn, DP-SGD's
            at the plan's own noise multiplier.
        path: where to save the picture, by its extension (.png, .pdf, .svg); None saves nothing.

    Returns:
        A `matplotlib.figure.Figure`.

    Raises:
        ImportError: if matplotlib is not installed.
        TypeError: if `plan` is not a `TrainingPlan`.
    """
    if not isinstance(plan, TrainingPlan):
        raise TypeError(f"Expected `plan` to be a TrainingPlan. Received: plan={plan!r}.")
    figure = _new_figure(panels=1 if choice is None else 2)
    axes = list(figure.axes)
    if choice is not None:
        _draw_choice(axes.pop(0), plan, choice)
    _draw_steps(axes.pop(0), plan, choice)
    how = "Poisson sampling" if plan.sampling == "cyclic_poisson" else "fixed order"
    figure.suptitle(
        f"{plan.num_steps:,} steps, batch {plan.batch_size:,} of {plan.num_examples:,}, {how}, "
        f"epsilon = {plan.epsilon():.3g}, delta = {plan.delta:.2g}",
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
    bands = [row.num_bands for row in choice.candidates]
    values = [row.expected_rmse for row in choice.candidates]
    axis.plot(bands, values, "o-", color=_BLUE, markersize=4)
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
    powers = [2**power for power in range(max(bands).bit_length())]
    axis.set_xticks(powers, [str(power) for power in powers])
    axis.set_ylim(0, 1.08 * max(values))
    axis.set_xlabel("number of bands")
    axis.set_ylabel("expected RMSE (clip norms)")
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
    ours = np.sqrt(plan.strategy.per_step_error()[::stride])
    sigma = plan.noise_multiplier
    axis.plot(
        steps, sigma * scale * ours, color=_BLUE, label=_label("this plan", plan.num_bands, sigma)
    )
    dp_sgd = sigma if choice is None else choice.dp_sgd.noise_multiplier
    axis.plot(
        steps,
        dp_sgd * scale * np.sqrt(steps),
        color=_GREY,
        linestyle="--",
        label=_label("DP-SGD", 1, dp_sgd),
    )
    axis.set_ylim(bottom=0)
    axis.set_xlabel("step")
    axis.set_ylabel("noise in the sum of gradients\n(RMSE, clip norms)")
    same = "epsilon" if choice is not None else "noise multiplier"
    axis.set_title(f"Error of every step, at the same {same}", fontsize=10)
    axis.legend(frameon=False)


def _label(name: str, bands: int, sigma: float) -> str:
    return f"{name}: {bands} band{'s' if bands > 1 else ''}, noise multiplier {sigma:.3g}"
