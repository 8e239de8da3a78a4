"""Test configuration: quiet TensorFlow and two logical CPU devices for every test process.

GPUs are hidden; `CUDA_VISIBLE_DEVICES=0 TF_FORCE_GPU_ALLOW_GROWTH=true pytest` runs tests on one.
"""

import gc
import os
import pathlib
import random

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
os.environ.setdefault("KERAS_BACKEND", "tensorflow")
os.environ.setdefault("CUDA_VISIBLE_DEVICES", "-1")
# On CPUs with AMX, bfloat16 is refused without it.
os.environ.setdefault("ONEDNN_MAX_CPU_ISA", "AVX512_CORE_FP16")

import keras
import pytest
import tensorflow as tf

tf.config.set_logical_device_configuration(
    tf.config.list_physical_devices("CPU")[0], [tf.config.LogicalDeviceConfiguration()] * 2
)
# On NVIDIA GPUs it is on by default, and everything private is refused there.
tf.config.experimental.enable_tensor_float_32_execution(False)


@pytest.fixture(autouse=True)
def _same_seeds():
    """Every test starts from the same seeds, whatever ran before it."""
    keras.utils.set_random_seed(1)


@pytest.fixture(autouse=True, scope="module")
def _no_search_through_what_stays():
    """Keeps the garbage collector away from what earlier files of tests left.

    TensorFlow keeps every function that it compiled. After some hundred tests a single search for
    garbage took up to minutes, in whichever test it happened to begin.
    """
    yield
    gc.collect()
    gc.freeze()


# About two minutes on two cores: one or two files of each room.
QUICK = (
    "accounting/test_round_loss.py",
    "clipping/checks/test_refusals.py",
    "clipping/test_factors.py",
    "clipping/test_norms.py",
    "clipping/test_sums.py",
    "noise/test_lattice.py",
    "noise/test_philox.py",
    "noise/test_shards.py",
    "optimizers/test_bandmf.py",
    "planning/test_plan.py",
    "planning/test_statement.py",
    "record/test_composition.py",
    "rgp/test_algebra.py",
    "sampling/",
    "strategies/test_sensitivity.py",
    "strategies/test_toeplitz.py",
    "test_doctests.py",
    "test_environment.py",
    "test_keras_internals.py",
    "test_layout.py",
    "test_printed.py",
)


# Cases that take many seconds, beside those that say so where they are defined: a case a line. Most
# are heavy models in a sweep whose other cases run always.
SLOW = frozenset((pathlib.Path(__file__).parent / "slow.txt").read_text().split("\n"))


def pytest_collection_modifyitems(items):
    """Marks slow tests, and those of the inner loop, `pytest -m quick`; shuffles them if asked to.

    CI has no time for all slow tests. In the order of its commit each commit runs others of them.
    """
    here = pathlib.Path(__file__).parent
    if "KERAS_BANDMF_SHUFFLE" in os.environ:
        random.Random(os.environ["KERAS_BANDMF_SHUFFLE"]).shuffle(items)
    for item in items:
        if item.nodeid in SLOW:
            item.add_marker("slow")
        place = item.path.relative_to(here).as_posix() if item.path.is_relative_to(here) else ""
        if place.startswith(QUICK) and not item.get_closest_marker("slow"):
            item.add_marker("quick")
