"""The progress bar of a search: what it shows, and where it ends."""

import numpy as np
import pytest

import keras_bandmf as bandmf


def test_the_bar_shows_the_search_to_its_end(capsys):
    seen = []
    bar = bandmf.ProgressBar()

    def show(progress):
        seen.append(progress)
        bar(progress)

    s = bandmf.strategies.BandedStrategy.optimize(40, 3, callback=show)
    shown = capsys.readouterr().out
    last = shown.rstrip("\n").replace("\r", "\n").splitlines()[-1]
    assert f"{len(seen)}/Unknown" in last and shown.endswith("\n")
    assert f"loss: {s.loss():.4f}" in last
    assert f"gain: {seen[-1].gain:.4e}" in last and "target_gain: 1.0000e-09" in last
    assert seen[-1].gain < seen[-1].target_gain


def test_a_bar_with_a_target_never_passes_it(capsys):
    bandmf.strategies.BandedStrategy.optimize(40, 3, callback=bandmf.ProgressBar(2))
    shown = capsys.readouterr().out
    assert "2/2" in shown and "3/2" not in shown


def test_one_bar_serves_several_searches(capsys):
    bar = bandmf.ProgressBar()
    for n in (20, 30):
        seen = []
        bandmf.strategies.BandedStrategy.optimize(
            n, 3, callback=lambda p, seen=seen: (bar(p), seen.append(p))
        )
        assert f"{len(seen)}/Unknown" in capsys.readouterr().out


def test_the_bar_takes_toeplitz_searches_and_can_be_silent(capsys):
    bandmf.strategies.ToeplitzStrategy.optimize(200, 4, callback=bandmf.ProgressBar())
    assert "/Unknown" in capsys.readouterr().out
    bandmf.strategies.BandedStrategy.optimize(20, 2, callback=bandmf.ProgressBar(verbose=0))
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
    "argument",
    [
        {"target": 0},
        {"target": 2.0},
        {"target": True},
        {"verbose": 2},
        {"verbose": True},
        {"verbose": "auto"},
        {"target": np.nan},
    ],
)
def test_bad_arguments(argument):
    (name,) = argument
    with pytest.raises((TypeError, ValueError), match=f"`{name}`.*Received: {name}="):
        bandmf.ProgressBar(**argument)
