"""The module that computes a statement's epsilon again, in a process without this package."""

import dataclasses
import json
import pathlib
import subprocess
import sys

import pytest

from keras_bandmf.record.composition import compose
from tests.plans import make_plan

SCRIPT = pathlib.Path(__file__).parent.parent / "keras_bandmf_cli" / "verification.py"
PROGRAM = """
import runpy, sys
sys.modules["keras_bandmf"] = None  # importing it fails
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def verified(tmp_path, text):
    path = tmp_path / "statement.json"
    path.write_text(text)
    command = [sys.executable, "-c", PROGRAM, str(SCRIPT), str(path)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, check=False)
    return done.returncode, done.stdout + done.stderr


@pytest.mark.parametrize("changes", [{}, {"num_bands": 1}, {"sampling": "fixed_order"}])
def test_plans_are_verified(tmp_path, changes):
    code, text = verified(tmp_path, make_plan(**changes).statement().to_json())
    assert code == 0 and text.startswith("Verified"), text


@pytest.mark.slow
def test_several_runs_are_verified_and_a_false_epsilon_is_not(tmp_path):
    both = compose([make_plan().statement(), make_plan(num_bands=1).statement()])
    code, text = verified(tmp_path, both.to_json())
    assert code == 0 and text.startswith("Verified"), text
    false = json.loads(both.to_json()) | {"epsilon": both.epsilon * 0.999}
    code, text = verified(tmp_path, json.dumps(false))
    assert code == 1 and text.startswith("NOT THE SAME"), text


@pytest.mark.slow
def test_a_secret_group_is_said_not_to_be_verified(tmp_path):
    known = make_plan().statement()
    secret = dataclasses.replace(
        known, epsilon=known.epsilon / 2, accounted_delta=None, accountant="Monte Carlo"
    )
    code, text = verified(tmp_path, secret.to_json())
    assert code == 0 and text.startswith("Not verified: epsilon"), text
    above = dataclasses.replace(secret, epsilon=2 * known.epsilon)
    assert verified(tmp_path, above.to_json())[0] == 1
