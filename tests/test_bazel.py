"""Bazel itself reads BUILD and runs tests, where it is installed (Debian: bazel-bootstrap)."""

import os
import pathlib
import shutil
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).resolve().parent.parent
BAZEL = shutil.which("bazel")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(BAZEL is None, reason="Bazel is not installed"),
]


@pytest.fixture(scope="module")
def bazel(tmp_path_factory):
    """A function that runs a command of Bazel in a copy of the files, with this interpreter."""
    folder = tmp_path_factory.mktemp("bazel")
    kept = shutil.ignore_patterns(".git", "bazel-*", "__pycache__", ".*_cache", "*.egg-info")
    copy = shutil.copytree(ROOT, folder / "copy", ignore=kept)
    path = os.pathsep.join([os.path.dirname(sys.executable), os.environ["PATH"]])
    start = [BAZEL, f"--output_user_root={folder / 'output'}"]

    def run(*arguments):
        return subprocess.run(
            [*start, *arguments],
            cwd=copy,
            env={**os.environ, "PATH": path},
            capture_output=True,
            text=True,
            check=False,
        )

    yield run
    run("shutdown")


def test_every_target_is_loaded(bazel):
    found = bazel("query", "//...")
    assert found.returncode == 0, found.stderr
    targets = set(found.stdout.split())
    rooms = {path.parent.name for path in ROOT.glob("keras_bandmf/*/__init__.py")}
    assert {f"//:{room}" for room in rooms if (ROOT / "tests" / room).exists()} <= targets
    files = (path.relative_to(ROOT).with_suffix("") for path in ROOT.glob("tests/**/test_*.py"))
    assert {"//:" + "_".join(file.parts) for file in files} <= targets


def test_a_test_passes_and_a_failing_one_fails(bazel):
    passed = bazel("test", "--config=container", "//:tests_test_printed")
    assert passed.returncode == 0, passed.stdout + passed.stderr
    failed = bazel(
        "test", "--config=container", "//:tests_test_printed", "--test_arg=no_such_file.py"
    )
    assert failed.returncode == 3 and "FAILED" in failed.stdout, failed.stderr


def test_the_inner_loop(bazel):
    found = bazel("test", "--config=container", "//:quick")
    assert found.returncode == 0, found.stdout[-5000:]
