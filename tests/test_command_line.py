"""The command line: the report, the files, and mistakes reported without a traceback."""

import dataclasses
import os
import re
import subprocess
import sys

import numpy as np
import pytest

from keras_bandmf.audit import AuditReport
from keras_bandmf.planning.plan import TrainingPlan
from keras_bandmf.planning.statement import Statement
from keras_bandmf_cli import commands
from keras_bandmf_cli.command_line import main

GOOD = {
    "num_examples": "1000",
    "batch_size": "50",
    "num_steps": "40",
    "epsilon": "2",
    "delta": "1e-5",
}


def command(name="plan", **changes):
    values = {**GOOD, **changes}
    return [name, *(f"--{key}={value}" for key, value in values.items() if value is not None)]


def test_the_console_script_reads_the_arguments_of_the_process(capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["keras-bandmf", "plan", "--help"])
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


def test_compare_bands_prints_the_table_of_the_function(capsys):
    import keras_bandmf

    run = {"num_examples": 1000, "batch_size": 50, "num_steps": 40, "epsilon": 2.0, "delta": 1e-5}
    assert main(command("compare-bands", max_bands="8")) == 0
    out = capsys.readouterr().out
    assert out == f"{keras_bandmf.compare_bands(**run, max_bands=8)}\n"
    assert "*" in out


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "COMMAND"),
        (["train"], "'train'"),
        (command(num_examples=None), "--num_examples"),
        (command(delta=None), "--delta"),
        (command(epsilon="much"), "'much'"),
        (command(surprise="1"), "surprise"),
        (command(sampling="shuffle"), "'shuffle'"),
        (command(num_bands="some"), "'some'"),
        (command(epochs="3"), "--epochs: not allowed with argument --num_steps"),
        (command(num_steps=None), "--epochs --num_steps is required"),
        (command("compare-bands", json="plan.json"), "--json"),
        (command(plot="/no/such/folder/plan.png"), "--plot"),
        (command(json="/no/such/folder/plan.json"), "--json"),
    ],
)
def test_mistakes_in_the_arguments_end_with_2(arguments, words, capsys):
    assert main(arguments) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("error: ")
    assert words in err.splitlines()[0]


@pytest.mark.parametrize("name", ["plan", "compare-bands"])
@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"num_bands": "21"}, "Use at most 20 bands"),
        ({"epsilon": "-1"}, "epsilon=-1.0"),
        ({"batch_size": "2000"}, "batch_size=2000"),
        ({"delta": "1.5"}, "delta"),
    ],
)
def test_a_refused_plan_ends_with_1_and_one_line(name, changes, words, capsys):
    assert main(command(name, **changes)) == 1
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("error: ")
    assert words in err
    assert err.count("\n") == 1


def test_a_file_that_cannot_be_written_ends_with_1(capsys, tmp_path):
    assert main(command(num_bands="2", json=tmp_path)) == 1  # a folder
    assert capsys.readouterr().err.startswith("error: ")


def test_help(capsys):
    assert main(["--help"]) == 0
    out = capsys.readouterr().out
    assert "plan" in out and "compare-bands" in out
    assert main(["plan", "--help"]) == 0
    out = capsys.readouterr().out
    for name in (*GOOD, "epochs", "num_bands", "sampling", "plot", "json"):
        assert f"--{name}" in out


def test_as_a_module():
    run = subprocess.run(
        [sys.executable, "-m", "keras_bandmf", *command(epsilon="much")],
        capture_output=True,
        text=True,
        env={**os.environ, "TF_CPP_MIN_LOG_LEVEL": "3"},
        check=False,
    )
    assert run.returncode == 2
    assert "error: argument --epsilon: invalid float value: 'much'" in run.stderr
    assert "Traceback" not in run.stderr


@pytest.mark.parametrize(
    "arguments", [["--help"], ["plan", "--help"], ["plan"], command(epsilon="much"), ["train"]]
)
def test_help_and_mistakes_are_answered_without_tensorflow(arguments):
    program = (
        "import sys\n"
        "sys.modules['tensorflow'] = sys.modules['keras_bandmf'] = None  # importing them fails\n"
        "from keras_bandmf_cli.command_line import main\n"
        f"raise SystemExit(main({arguments!r}))"
    )
    run = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=False
    )
    assert run.returncode == (0 if "--help" in arguments else 2), run.stderr
    assert "usage: keras-bandmf" in run.stdout + run.stderr


def test_nothing_but_the_report_is_written(tmp_path):
    """TensorFlow's first lines do not appear, but what it says when it fails does."""
    (tmp_path / "plan.json").write_text(PLAN.to_json())
    environment = {k: v for k, v in os.environ.items() if k != "TF_CPP_MIN_LOG_LEVEL"}
    program = [sys.executable, "-m", "keras_bandmf_cli", "show", "plan.json"]
    options = {"capture_output": True, "text": True, "cwd": tmp_path, "check": False}
    here = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    environment["PYTHONPATH"] = os.pathsep.join([here, environment.get("PYTHONPATH", "")])
    run = subprocess.run(program, env=environment, **options)
    assert (run.returncode, run.stdout, run.stderr) == (0, f"{PLAN}\n", "")
    (tmp_path / "keras").mkdir()
    (tmp_path / "keras" / "__init__.py").write_text("raise ImportError('a broken keras')")
    environment["PYTHONPATH"] = os.pathsep.join([str(tmp_path), environment["PYTHONPATH"]])
    run = subprocess.run(program, env=environment, **options)
    assert run.returncode == 1 and "a broken keras" in run.stderr


PLAN = TrainingPlan(
    num_examples=1000, batch_size=50, epochs=1, noise_multiplier=1.0, delta=1e-5, num_bands=2
)


def test_plans_and_statements_are_shown(capsys, tmp_path):
    plan, statement = tmp_path / "plan.json", tmp_path / "statement.json"
    plan.write_text(PLAN.to_json())
    assert main(["show", str(plan)]) == 0
    assert capsys.readouterr().out == f"{PLAN}\n"
    assert main(["statement", str(plan), f"--json={statement}"]) == 0
    assert capsys.readouterr().out.startswith(f"{PLAN.statement()}\n")
    assert Statement.from_json(statement.read_text()) == PLAN.statement()
    assert main(["show", str(statement)]) == 0
    assert capsys.readouterr().out == f"{PLAN.statement()}\n"
    for kept in (plan, statement):
        assert main(["verify", str(kept)]) == 0
        assert capsys.readouterr().out.startswith("Verified: ")


def test_a_false_epsilon_is_not_confirmed(capsys, tmp_path):
    kept = tmp_path / "statement.json"
    true = PLAN.statement()
    kept.write_text(dataclasses.replace(true, epsilon=0.99 * true.epsilon).to_json())
    assert main(["verify", str(kept)]) == 1
    out, err = capsys.readouterr()
    assert out.startswith("NOT THE SAME") and err == ""


@pytest.mark.parametrize("name", ["show", "statement", "verify"])
@pytest.mark.parametrize("text", ["", "[]", '{"format": "other"}', None])
def test_files_that_are_neither(name, text, capsys, tmp_path):
    if text is not None:
        (tmp_path / "kept.json").write_text(text)
    assert main([name, str(tmp_path / "kept.json")]) == 1
    out, err = capsys.readouterr()
    assert out == "" and "kept.json" in err and err.count("\n") == 1
    assert main([name]) == 2


def test_a_large_delta_is_noted(capsys):
    assert main(command(num_bands="2", delta="0.01")) == 0
    assert "Note: delta = 0.01 exceeds 1 / num_examples = 0.001" in capsys.readouterr().out


def test_the_plan_and_its_row_have_one_noise_multiplier(capsys):
    assert main(command()) == 0
    plan, table = capsys.readouterr().out.split("Bands compared")
    (sigma,) = re.findall(r"noise multiplier +(\S+)", plan)
    (row,) = (line.split() for line in table.splitlines() if line.startswith("*"))
    assert row[3] == sigma


def test_the_limit_of_bands_is_named_where_it_binds(capsys):
    run = {"num_examples": "100000000", "num_steps": "2000", "batch_size": "50000"}
    assert main(command("compare", **run, delta="1e-9", max_bands="4")) == 0
    assert "The limit of 4 bands is what ended the search" in capsys.readouterr().out
    assert main(command("compare", max_bands="16")) == 0
    assert "limit" not in capsys.readouterr().out


@pytest.mark.slow
def test_random_allocation_is_certified_unless_it_is_to_be_known(capsys, tmp_path):
    document = tmp_path / "plan.json"
    run = {
        "sampling": "random_allocation",
        "max_participations": "2",
        "num_bands": "4",
        "json": document,
    }
    assert main(command(**run)) == 0
    assert "if the random group of a row (and its steps" in capsys.readouterr().out
    certified = TrainingPlan.from_json(document.read_text())
    assert certified.certificate is not None
    assert main(command(**run, amplification="known_group")) == 0
    known = TrainingPlan.from_json(document.read_text())
    assert known.certificate is None
    assert known.noise_multiplier > 1.3 * certified.noise_multiplier


def test_a_plan_of_users(capsys, tmp_path):
    document = tmp_path / "plan.json"
    assert main(command(num_bands="2", unit="user", json=document)) == 0
    assert TrainingPlan.from_json(document.read_text()).unit == "user"
    assert "one user" in capsys.readouterr().out
    assert main(command(num_bands="2", unit="a\nb")) == 1
    assert "`unit` to be a word" in capsys.readouterr().err


def test_audit_writes_report_and_picture(capsys, tmp_path):
    pytest.importorskip("matplotlib")
    document = tmp_path / "plan.json"
    assert main(command(num_bands="2", json=document)) == 0
    capsys.readouterr()
    wanted = ["audit", f"--plan={document}", "--trials=400", f"--output={tmp_path}"]
    assert main(wanted) == 0
    out, err = capsys.readouterr()
    assert err == ""
    report = AuditReport.from_json((tmp_path / "audit.json").read_text())
    assert report.kind == "step"
    assert report.epsilon == TrainingPlan.from_json(document.read_text()).epsilon()
    assert str(report) in out
    assert (tmp_path / "audit.txt").read_text() == f"{report}\n"
    assert (tmp_path / "audit.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"


def test_an_audit_that_contradicts_its_plan_ends_with_1(capsys, tmp_path, monkeypatch):
    plan = TrainingPlan(
        num_examples=1000, batch_size=50, epochs=1, noise_multiplier=1.0, delta=1e-5, num_bands=2
    )
    document = tmp_path / "plan.json"
    document.write_text(plan.to_json())
    asked = {}

    def contradicts(plan, **options):
        asked.update(options)
        rows = np.zeros(2)
        return AuditReport(
            kind="step",
            attack="all",
            epsilon_lower_bound=9.0,
            epsilon=plan.epsilon(),
            delta=plan.delta,
            confidence=0.9,
            scores_in=rows,
            scores_out=rows,
        )

    monkeypatch.setattr(commands, "audit_steps", contradicts)
    assert main(["audit", f"--plan={document}", "--trials=64", "--confidence=0.9"]) == 1
    out, err = capsys.readouterr()
    assert "FALSE" in out
    assert err == ""
    assert asked == {"trials": 64, "confidence": 0.9}


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["audit"], 2, "--plan"),
        (["audit", "--plan=PLAN", "--trials=many"], 2, "'many'"),
        (["audit", "--plan=PLAN", "--output=/no/such/folder"], 2, "--output"),
        (["audit", "--plan=/no/such/plan.json"], 1, "plan.json"),
        (["audit", "--plan=EMPTY"], 1, "error"),
        (["audit", "--plan=PLAN", "--trials=0"], 1, "trials"),
        (["audit", "--plan=PLAN", "--confidence=nan"], 1, "confidence"),
    ],
)
def test_mistakes_in_an_audit(arguments, code, words, capsys, tmp_path):
    plan = TrainingPlan(
        num_examples=1000, batch_size=50, epochs=1, noise_multiplier=1.0, delta=1e-5, num_bands=2
    )
    (tmp_path / "plan.json").write_text(plan.to_json())
    (tmp_path / "empty.json").write_text("")
    places = {"--plan=PLAN": "plan.json", "--plan=EMPTY": "empty.json"}
    arguments = [f"--plan={tmp_path / places[a]}" if a in places else a for a in arguments]
    assert main(arguments) == code
    out, err = capsys.readouterr()
    assert out == ""
    assert words in err
