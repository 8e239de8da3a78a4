"""The example that computes a statement's epsilon again, in a process without this package."""

import pathlib
import subprocess
import sys

import pytest

from tests.plans import make_plan

SCRIPT = pathlib.Path(__file__).parent.parent / "examples" / "verify_statement.py"
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
