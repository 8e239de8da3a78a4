"""Draws and tabulates what the paper reports about strategies, beside what the paper says.

    python examples/paper_figures.py [--figure a] [--max_steps 1000000] [--output FOLDER]

    a  how far Toeplitz strategies are from the exact banded optimum
    b  the error over the number of bands, for several epsilon and epochs
    c  the mechanisms compared over epsilon
    d  few epochs against full batches

The default takes minutes. `--max_steps 1000000` extends (a) to a million steps; it prints how long
each search will take. Writes a picture and a Markdown table per figure.
"""

from __future__ import annotations

import argparse
import dataclasses
import pathlib
import time

import quiet  # noqa: F401 - first

from matplotlib.figure import Figure

import paper_numbers as numbers

# Okabe and Ito: told apart by every kind of color vision, with a marker each besides.
COLORS = ("#000000", "#E69F00", "#56B4E9", "#009E73", "#D55E00", "#0072B2", "#CC79A7")
MARKERS = ("s", "v", "^", "D", "P", "o", "X")


@dataclasses.dataclass(frozen=True)
class Table:
    """A table to print and to write.

    Attributes:
        title: what it shows.
        header: the names of the columns.
        rows: cells, as text.
        remarks: the paper's own numbers, and why ours differ.
    """

    title: str
    header: list[str]
    rows: list[list[str]]
    remarks: str

    def __str__(self) -> str:
        """Markdown, with the columns aligned."""
        cells = [self.header, ["-" * len(name) for name in self.header], *self.rows]
        widths = [max(len(row[i]) for row in cells) for i in range(len(self.header))]
        lines = [
            "| " + " | ".join(cell.rjust(w) for cell, w in zip(row, widths, strict=True)) + " |"
            for row in cells
        ]
        return "\n".join([f"**{self.title}**", "", *lines, "", self.remarks, ""])


def styles(count: int) -> list[dict]:
    """A color and a marker for each of `count` lines."""
    order = [i % len(COLORS) for i in range(count)]
    return [{"color": COLORS[i], "marker": MARKERS[i], "markersize": 5} for i in order]


def panels(count: int) -> tuple[Figure, list]:
    """A figure with `count` axes side by side."""
    figure = Figure(figsize=(5.6 * count, 4.4), layout="constrained")
    figure.get_layout_engine().set(wspace=0.06)
    axes = list(figure.subplots(1, count, squeeze=False)[0])
    for axis in axes:
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(alpha=0.3, linewidth=0.6)
    return figure, axes


def powers_of_two(axis, largest: float) -> None:
    """A logarithmic x axis that names the powers of two, every other one of many."""
    powers = [2**power for power in range(int(largest).bit_length())]
    powers = powers[:: 1 + len(powers) // 9]
    axis.set_xscale("log", base=2)
    axis.set_xticks(powers, [str(power) for power in powers])


def plain_numbers(axis, ticks: list[float]) -> None:
    """A logarithmic y axis with these ticks, written out, of those within the data."""
    axis.set_yscale("log")
    low, high = axis.get_ylim()
    kept = [tick for tick in ticks if low <= tick <= high]
    axis.set_yticks(kept, [f"{tick:g}" for tick in kept])
    axis.set_yticks([], minor=True)


def figure_a(options: argparse.Namespace) -> tuple[Table, Figure]:
    """Toeplitz against the exact banded optimum."""
    found = list(numbers.gaps(options.max_steps, options.output / "cache"))
    table = Table(
        "Best Toeplitz strategy above the exact banded optimum, in RMSE",
        ["n", "b", "banded RMSE", "raw Toeplitz", "columns of norm 1", "search"],
        [
            [
                f"{g.num_steps:,}",
                str(g.num_bands),
                f"{g.exact:.6f}",
                f"{g.raw:.4f} %",
                f"{g.normalized:.4f} %",
                f"{g.seconds:.1f} s",
            ]
            for g in found
        ],
        "The paper: 0 to 2 % over all n and b tried, at most 0.25 % for n >= 16384 and b <= 32; an "
        "earlier version 0 to 4 %. Ours: the 2 % hold with columns of norm 1, the 4 % without. At "
        "n = 16384, b = 32 it is 0.26 %: a search that ends too early would show less. "
        "Ours end near the optimum, above it, so each gap is at least what is printed.",
    )
    figure, (axis,) = panels(1)
    bands = [b for b in numbers.BANDS if any(g.num_bands == b for g in found)]
    for b, style in zip(bands, styles(len(bands)), strict=True):
        row = [g for g in found if g.num_bands == b]
        steps = [g.num_steps for g in row]
        axis.plot(steps, [g.normalized for g in row], label=f"{b} bands", **style)
        axis.plot(steps, [g.raw for g in row], color=style["color"], linestyle=":", linewidth=1)
    axis.plot([], [], color="#666666", linestyle=":", linewidth=1, label="raw Toeplitz")
    longest = max(g.num_steps for g in found)
    axis.axhline(2.0, color="#666666", linestyle="--", linewidth=1)
    axis.text(longest, 2.1, "the paper: at most 2 %", ha="right", va="bottom", fontsize=8)
    if longest > 16_384:
        axis.plot([16_384, longest], [0.25, 0.25], color="#666666", linestyle="--", linewidth=1)
        axis.text(longest, 0.262, "and 0.25 % here", ha="right", va="bottom", fontsize=8)
    axis.set_xscale("log")
    plain_numbers(axis, [10.0**power for power in range(-7, 2)])
    axis.set_xlabel("training steps n")
    axis.set_ylabel("RMSE above the banded optimum (%)")
    axis.set_title("Toeplitz with columns of norm 1 against the exact optimum", fontsize=10)
    axis.legend(frameon=False, fontsize=8, loc="lower left")
    return table, figure


def figure_b(options: argparse.Namespace) -> tuple[Table, Figure]:
    """The error over the number of bands."""
    n, k = options.num_steps, options.epochs
    small = max(1, n // 4)
    epochs = [2**power for power in range(7) if 2**power < small]
    by_epsilon = [numbers.sweep(n, k, epsilon, options.delta) for epsilon in options.epsilons]
    by_epochs = [numbers.sweep(small, count, 1.0, options.delta) for count in epochs]
    table = Table(
        f"Best number of bands at delta = {options.delta:g}",
        ["n", "epochs", "epsilon", "best b", "noise multiplier", "RMSE", "DP-SGD / best"]
        + ["un-amplified / best", "the paper's rule", "RMSE by the rule / best"],
        [
            [
                f"{s.num_steps:,}",
                str(s.epochs),
                f"{s.epsilon:g}",
                str(s.choice.best.num_bands),
                f"{s.choice.best.noise_multiplier:.3f}",
                f"{s.choice.best.expected_rmse:.4f}",
                f"{s.choice.dp_sgd.expected_rmse / s.choice.best.expected_rmse:.3f}",
                f"{s.unamplified / s.choice.best.expected_rmse:.3f}",
                f"{s.rule:.1f}",
                f"{s.rmse_by_rule / s.choice.best.expected_rmse:.3f}",
            ]
            for s in by_epsilon + by_epochs
        ],
        "The paper: the best b is roughly epsilon sqrt(n) / k. Ours: it does grow with epsilon and "
        "fall with k, but is two to four times larger where the rule gives more than one; the "
        "valley is flat, so the rule costs little. The paper read its rule off plots over powers "
        "of two; numbers between them are compared here. Un-amplified is a fixed order with as "
        "many bands as fit an epoch.",
    )
    figure, axes = panels(2)
    settings = [
        (by_epsilon, f"{n:,} steps, {k} epochs", lambda s: f"epsilon = {s.epsilon:g}"),
        (by_epochs, f"{small:,} steps, epsilon = 1", lambda s: f"{s.epochs} epochs"),
    ]
    for axis, (sweeps, title, label) in zip(axes, settings, strict=True):
        for s, style in zip(sweeps, styles(len(sweeps)), strict=True):
            draw_sweep(axis, s, style, label(s).replace("1 epochs", "1 epoch"))
        axis.plot([], [], "*", color="#666666", markersize=11, label="best")
        axis.plot([], [], "_", color="#666666", markersize=9, label="un-amplified")
        powers_of_two(axis, max(s.num_steps // s.epochs for s in sweeps))
        plain_numbers(axis, [1, 2, 3, 5, 7, 10, 15, 20, 30, 50])
        axis.set_xlabel("number of bands (1: DP-SGD)")
        axis.set_ylabel("RMSE (clip norms)")
        axis.set_title(f"{title}, delta = {options.delta:g}", fontsize=10)
        axis.legend(frameon=False, fontsize=8, ncols=2, loc="upper right")
        axis.set_ylim(top=axis.get_ylim()[1] * 2.2)  # room for the legend
    return table, figure


def draw_sweep(axis, swept: numbers.Sweep, style: dict, label: str) -> None:
    """One curve, its lowest point, and its end: the bands of an epoch, where all take part."""
    rows = swept.choice.candidates
    bands = [row.num_bands for row in rows]
    axis.plot(bands, [row.expected_rmse for row in rows], label=label, **{**style, "markersize": 3})
    best = swept.choice.best
    color = style["color"]
    axis.plot(best.num_bands, best.expected_rmse, "*", color=color, markersize=11)
    end = swept.num_steps // swept.epochs, swept.unamplified
    axis.plot(*end, "_", color=color, markersize=9, markeredgewidth=2)
    last = bands[-1], rows[-1].expected_rmse
    axis.plot(*zip(last, end, strict=True), ":", color=color, linewidth=1)


def figure_c(options: argparse.Namespace) -> tuple[Table, Figure]:
    """The mechanisms over epsilon."""
    n, k, epsilons = options.num_steps, options.epochs, options.epsilons
    found = numbers.mechanisms(n, k, epsilons, options.delta)
    best = found["BandMF, amplified"]
    table = Table(
        f"RMSE of the mechanisms at n = {n:,}, {k} epochs, delta = {options.delta:g}; in brackets "
        "over that of amplified BandMF",
        ["mechanism", *(f"epsilon = {epsilon:g}" for epsilon in epsilons)],
        [
            [name, *(f"{v:.4f} ({v / b:.2f})" for v, b in zip(values, best, strict=True))]
            for name, values in found.items()
        ],
        "Buffered Toeplitz over un-amplified BandMF: "
        f"{found['buffered Toeplitz'][0] / found['BandMF, fixed order'][0]:.3f}. The paper "
        "(n = 16384, k = 8): amplified BandMF has about half the error of DP-SGD and of buffered "
        "Toeplitz at epsilon 1, 19 % less than the best of the others at epsilon 8, and buffered "
        "Toeplitz is about 5 % above un-amplified BandMF. The paper's delta is not known to us: "
        "delta = 1e-8 comes closer to its ratios than 1e-6.",
    )
    figure, (axis,) = panels(1)
    for (name, values), style in zip(found.items(), styles(len(found)), strict=True):
        axis.plot(epsilons, values, label=name, **style)
    powers_of_two(axis, max(epsilons))
    axis.set_xticks(epsilons, [f"{epsilon:g}" for epsilon in epsilons])
    plain_numbers(axis, [0.5, 1, 2, 3, 5, 7, 10, 15, 20, 30, 50])
    axis.set_xlabel("epsilon")
    axis.set_ylabel("RMSE (clip norms)")
    axis.set_title(f"{n:,} steps, {k} epochs, delta = {options.delta:g}", fontsize=10)
    axis.legend(frameon=False, fontsize=8)
    return table, figure


def figure_d(options: argparse.Namespace) -> tuple[Table, Figure]:
    """Few epochs of BandMF against full batches of DP-SGD."""
    n = max(2, options.num_steps // 8)
    epochs = [2**power for power in range(n.bit_length()) if 2**power <= n]
    full = numbers.full_batch(n, 1.0, options.delta)
    choices = [numbers.sweep(n, k, 1.0, options.delta).choice for k in epochs]
    table = Table(
        f"{n:,} steps at epsilon = 1, delta = {options.delta:g}; full-batch DP-SGD has RMSE "
        f"{full:.4f}",
        ["epochs", "gradients of full batch", "best b", "BandMF RMSE", "above full batch"]
        + ["DP-SGD above full batch"],
        [
            [
                str(k),
                f"{100 * k / n:.2f} %",
                str(choice.best.num_bands),
                f"{choice.best.expected_rmse:.4f}",
                f"{100 * (choice.best.expected_rmse / full - 1):.1f} %",
                f"{100 * (choice.dp_sgd.expected_rmse / full - 1):.1f} %",
            ]
            for k, choice in zip(epochs, choices, strict=True)
        ],
        "The paper: 32 epochs of BandMF have about the RMSE of full-batch DP-SGD with some 2 % of "
        "the work. Its exact setting is not known to us; n = 2048 comes near. The accounting of "
        "these comparisons is coarse and errs on the safe side: the last row, which is the full "
        "batch, is 0.3 % above it.",
    )
    figure, (axis,) = panels(1)
    black, _, _, _, _, blue, _ = styles(7)
    axis.plot(epochs, [c.dp_sgd.expected_rmse for c in choices], label="DP-SGD", **black)
    axis.plot(epochs, [c.best.expected_rmse for c in choices], label="BandMF, best b", **blue)
    axis.axhline(full, color="#666666", linestyle="--", linewidth=1, label="full-batch DP-SGD")
    powers_of_two(axis, n)
    plain_numbers(axis, [1, 2, 3, 4, 5, 7, 10, 15, 20, 30, 50])
    axis.set_xlabel("epochs: how often an example takes part")
    axis.set_ylabel("RMSE (clip norms)")
    axis.set_title(f"{n:,} steps, epsilon = 1, delta = {options.delta:g}", fontsize=10)
    axis.legend(frameon=False, fontsize=8)
    return table, figure


FIGURES = {
    "a": ("toeplitz_gap", figure_a),
    "b": ("bands", figure_b),
    "c": ("mechanisms", figure_c),
    "d": ("full_batch", figure_d),
}


def main(arguments: list[str] | None = None) -> None:
    """Computes, prints, writes and draws what was asked for."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--figure", choices=[*FIGURES, "all"], default="all")
    parser.add_argument("--output", type=pathlib.Path, default=pathlib.Path("paper_figures"))
    parser.add_argument("--max_steps", type=int, default=10_000, help="(a): the largest n")
    parser.add_argument("--num_steps", type=int, default=16_384, help="(b, c): n; the others less")
    parser.add_argument("--epochs", type=int, default=8, help="(b, c): k")
    parser.add_argument("--epsilons", type=float, nargs="+", default=[0.5, 1.0, 2.0, 4.0, 8.0])
    parser.add_argument("--delta", type=float, default=1e-6)
    options = parser.parse_args(arguments)
    options.output.mkdir(parents=True, exist_ok=True)
    for letter in FIGURES if options.figure == "all" else [options.figure]:
        started = time.perf_counter()
        name, make = FIGURES[letter]
        table, figure = make(options)
        (options.output / f"{name}.md").write_text(str(table))
        figure.savefig(options.output / f"{name}.png", dpi=150)
        print(table)
        print(f"({letter}) {options.output / name}.md, .png: {time.perf_counter() - started:.0f} s")


if __name__ == "__main__":
    main()
