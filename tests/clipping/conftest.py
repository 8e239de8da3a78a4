"""Fixtures of the clipping tests."""

import keras
import pytest


@pytest.fixture
def float64():
    """Everything in float64 for one test."""
    keras.config.set_floatx("float64")
    keras.config.set_dtype_policy("float64")
    yield
    keras.config.set_floatx("float32")
    keras.config.set_dtype_policy("float32")


@pytest.fixture
def bfloat16():
    """mixed_bfloat16 for one test."""
    keras.config.set_dtype_policy("mixed_bfloat16")
    yield
    keras.config.set_dtype_policy("float32")
