"""The command line: the report, the files, and mistakes told without a traceback."""

import os
import subprocess
import sys

import pytest

from keras_bandmf.__main__ import main
from keras_bandmf.planning.plan import TrainingPlan

GOOD = {
    "num_examples": "1000",
    "batch_size": "50",
    "num_steps": "40",
    "epsilon": "2",
    "delta": "1e-5",
}


def command(**changes):
    values = {**GOOD, **changes}
    flags = [f"--{name}={value}" for name, value in values.items() if value is not None]
    return ["keras_bandmf", "plan", *flags]


def test_the_console_script_reads_the_arguments_of_the_process(capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["keras-bandmf", "--help"])
    assert main() == 0
    assert "--num_examples" in capsys.readouterr().out


def test_report_and_files(capsys, tmp_path):
    pytest.importorskip("matplotlib")
    plot, document = tmp_path / "plan.png", tmp_path / "plan.json"
    assert main(command(num_bands="4", plot=plot, json=document)) == 0
    out, err = capsys.readouterr()
    plan = TrainingPlan.from_json(document.read_text())
    assert (plan.num_bands, plan.num_steps, plan.batch_size) == (4, 40, 50)
    assert plan.epsilon() <= 2.0
    assert str(plan) in out
    for words in ("bands", "noise multiplier", "epsilon", "expected RMSE", "/ DP-SGD"):
        assert words in out
    assert plot.stat().st_size > 10_000
    assert err == ""


def test_auto_and_fixed_order(capsys):
    assert main(command(sampling="fixed_order", num_steps=None, epochs="2")) == 0
    out = capsys.readouterr().out
    assert "bands: 20" in out  # every band helps: as many as an epoch has steps
    assert "zero-out" in out


def test_auto_sampling_compares_both(capsys):
    assert main(command(sampling="auto", num_bands="2")) == 0
    out = capsys.readouterr().out
    table = out.split("Bands compared")[1]
    assert table.count("cyclic_poisson") == table.count("fixed_order") == 2
    assert "bands: 2" in out


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["keras_bandmf"], "Expected the command `plan`"),
        (["keras_bandmf", "train"], "Received: train"),
        (command(num_examples=None), "Expected --num_examples"),
        (command(delta=None), "Expected --delta"),
        (command(epsilon="much"), "--epsilon=much"),
        (command(surprise="1"), "surprise"),
        (command(sampling="shuffle"), "cyclic_poisson|fixed_order"),
        (command(num_bands="some"), "--num_bands=some"),
        (command(num_bands="21"), "Use at most 20 bands"),
        (command(epochs="3"), "exactly one of `epochs` and `num_steps`"),
        (command(epsilon="-1"), "epsilon=-1.0"),
        (command(batch_size="2000"), "batch_size=2000"),
        (command(plot="/no/such/folder/plan.png"), "--plot"),
        (command(json="/no/such/folder/plan.json"), "--json"),
    ],
)
def test_mistakes(arguments, words, capsys):
    assert main(arguments) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("error: ")
    assert words in err
    assert "Usage: python -m keras_bandmf plan" in err


def test_help(capsys):
    assert main(["keras_bandmf", "--help"]) == 0
    out = capsys.readouterr().out
    for name in (*GOOD, "epochs", "num_bands", "sampling", "plot", "json"):
        assert f"--{name}" in out or f"--[no]{name}" in out


def test_as_a_module():
    run = subprocess.run(
        [sys.executable, "-m", "keras_bandmf", *command(epsilon="much")[1:]],
        capture_output=True,
        text=True,
        env={**os.environ, "TF_CPP_MIN_LOG_LEVEL": "3"},
        check=False,
    )
    assert run.returncode == 2
    assert "error: flag --epsilon=much" in run.stderr
    assert "Traceback" not in run.stderr
