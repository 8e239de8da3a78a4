"""Test configuration: quiet TensorFlow and two logical CPU devices for every test process.

GPUs are hidden; `CUDA_VISIBLE_DEVICES=0 TF_FORCE_GPU_ALLOW_GROWTH=true pytest` runs tests on one.
"""

import os

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
os.environ.setdefault("KERAS_BACKEND", "tensorflow")
os.environ.setdefault("CUDA_VISIBLE_DEVICES", "-1")

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
