"""A key is of one process: forks, pickles and copies."""

import copy
import pathlib
import pickle
import subprocess
import sys
import warnings

import numpy as np
import pytest

from tests import runs

ROOT = pathlib.Path(__file__).parent.parent.parent


def test_a_fork_cannot_draw_the_noise_of_its_parent():
    """The same noise on two gradients would cancel."""
    job = subprocess.run(
        [sys.executable, "-m", "tests.fork_job"], cwd=ROOT, capture_output=True, timeout=300
    )
    assert job.returncode == 0, job.stderr.decode()[-2000:]


@pytest.mark.parametrize("write", [pickle.dumps, copy.copy, copy.deepcopy])
def test_bound_batches_warn_before_their_key_is_written(write):
    """As checkpoints do; without a key, or with that of a test, there is nothing to keep."""
    plan = runs.make_plan()
    batches = plan.batches(*runs.counting_data())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        write(batches)
        write(plan.batches(*runs.counting_data(), seed=3))
    batches.bind(np.array([1, 2], np.uint64))
    with pytest.warns(UserWarning, match="sampler's key"):
        write(batches)


def test_pickled_batches_are_the_same_batches():
    batches = runs.make_plan().batches(*runs.counting_data())
    batches.bind(np.array([1, 2], np.uint64))
    with pytest.warns(UserWarning, match="sampler's key"):
        again = pickle.loads(pickle.dumps(batches))
    np.testing.assert_array_equal(again.indices(3), batches.indices(3))
