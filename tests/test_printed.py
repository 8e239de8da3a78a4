"""Printed numbers: read back in exact arithmetic they are on the safe side."""

import math
from decimal import Decimal

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from keras_bandmf._printed import raised_for_progress, rounded_down, rounded_up

POSITIVE = st.floats(1e-300, 1e300, allow_subnormal=False)
NEAR_TENS = st.builds(
    lambda k, n: float(f"1e{k}") * (1 + n * 2.0**-52), st.integers(-12, 12), st.integers(-9, 9)
)
VALUES = POSITIVE | NEAR_TENS | st.floats(1e-12, 100.0)


@settings(max_examples=500, deadline=None, derandomize=True)
@given(VALUES, st.integers(1, 12))
@example(1.2349e-5, 3)
@example(2.0000000000000004, 6)
@example(0.1 + 0.2, 6)
def test_rounded_numbers_are_on_the_safe_side(value, digits):
    up, down = rounded_up(value, digits), rounded_down(value, digits)
    for text, is_safe in (
        (up, Decimal(up) >= Decimal(value)),
        (down, Decimal(down) <= Decimal(value)),
    ):
        assert is_safe or float(text) == value  # the decimal that was typed
        assert len(Decimal(text).normalize().as_tuple().digits) <= digits
    assert float(up) <= value * (1 + 10.0 ** (1 - digits) + 1e-15)
    assert float(down) >= value * (1 - 10.0 ** (1 - digits) - 1e-15)


@settings(max_examples=500, deadline=None, derandomize=True)
@given(VALUES.filter(lambda value: value < 1e9))
@example(0.0010000000000000002)
def test_what_the_progress_bar_prints_is_not_below(value):
    logged = raised_for_progress(value)
    text = f"{logged:.4f}" if logged > 1e-3 else f"{logged:.4e}"  # as Keras does
    assert Decimal(text) >= Decimal(value) or float(text) == value
    assert logged <= max(value * 1.0002, value + 1.01e-4)


@pytest.mark.parametrize(
    ("value", "digits", "up", "down"),
    [
        (1.2349e-5, 3, "1.24e-05", "1.23e-05"),
        (1e-5, 3, "1e-05", "1e-05"),  # the float is above 10^-5 by 8e-22
        (2.00049, 4, "2.001", "2"),
        (1.9999999, 6, "2", "1.99999"),
        (2.0, 6, "2", "2"),
        (123456.7, 4, "1.235e+05", "1.234e+05"),
        (9.9999, 2, "10", "9.9"),
        (0.0, 6, "0", "0"),
        (math.inf, 6, "inf", "inf"),
    ],
)
def test_examples(value, digits, up, down):
    assert (rounded_up(value, digits), rounded_down(value, digits)) == (up, down)


def test_progress_leaves_zero_and_infinity():
    assert raised_for_progress(0.0) == 0.0
    assert raised_for_progress(math.inf) == math.inf
    assert raised_for_progress(2.00001) == 2.0001
