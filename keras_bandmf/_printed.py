"""Numbers for people to read: rounded to the safe side, never to the nearest."""

from __future__ import annotations

import decimal
import math


def rounded_up(value: float, digits: int) -> str:
    """Prints a number rounded up, as is safe for epsilon, delta, errors and norms.

    Formal guarantees:
        The decimal printed, as a real number, is at least the float `value`; with one exception: a
        float whose shortest decimal (its `repr`) has at most `digits` digits is printed as that
        decimal, which is what was typed and reads back as that very float.

    Args:
        value: A float; zero and infinities are printed as they are.
        digits: The largest number of significant digits, from 1 to 15.

    Returns:
        The number, as the format "g" would print it.

    Example:
        >>> rounded_up(1.2349e-5, 3)
        '1.24e-05'
        >>> rounded_up(1e-5, 3)
        '1e-05'
    """
    return _rounded(value, digits, decimal.ROUND_CEILING)


def rounded_down(value: float, digits: int) -> str:
    """Prints a number rounded down, as is safe for noise multipliers.

    Formal guarantees:
        See `rounded_up`, in the other direction: the decimal is at most `value`.

    Args:
        value: A float; zero and infinities are printed as they are.
        digits: The largest number of significant digits, from 1 to 15.

    Returns:
        The number, as the format "g" would print it.
    """
    return _rounded(value, digits, decimal.ROUND_FLOOR)


def raised_for_progress(value: float) -> float:
    """Returns the smallest float of at least `value` that Keras's progress bar prints in full.

    The bar prints four decimals, and five digits of numbers up to 0.001, rounded to the nearest.

    Args:
        value: At least 0.

    Returns:
        A float whose printed form is not below `value`.
    """
    if not 0 < value < math.inf:
        return value
    # 0.001 and a little more would be printed with four decimals, as 0.0010.
    digits = 5 if value <= 1e-3 else math.floor(math.log10(value)) + 5
    return float(_shortened(value, max(digits, 1), decimal.ROUND_CEILING))


def _rounded(value: float, digits: int, rounding: str) -> str:
    if value == 0 or not math.isfinite(value):
        return f"{value:g}"
    return f"{float(_shortened(value, digits, rounding)):.{digits}g}"


def _shortened(value: float, digits: int, rounding: str) -> decimal.Decimal:
    shortest = decimal.Decimal(repr(float(value)))
    if len(shortest.normalize().as_tuple().digits) <= digits:
        return shortest
    context = decimal.Context(prec=digits, rounding=rounding)
    return context.create_decimal(decimal.Decimal(float(value)))
