"""The workload of a Keras optimizer: how its weights depend on the gradients it is given."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, Literal, NoReturn

import keras
import numpy as np

from keras_bandmf._checks import checked_choice, checked_int
from keras_bandmf.strategies import Workload
from keras_bandmf.strategies.workload import stable_curvature

_WAY_OUT = "Leave `workload` out: prefix sums are the usual choice for any optimizer."
# With any of these the weights are no longer the sums of gradients that a `Workload` describes.
_REFUSED_SETTINGS = (
    "clipnorm",
    "clipvalue",
    "global_clipnorm",
    "loss_scale_factor",
    "gradient_accumulation_steps",
)
# With "auto": in how many steps SGD undoes the noise along each curvature, in units of the run.
_UNDONE_IN = (4.0, 1.0, 0.25, 0.0625)


def workload_from_optimizer(
    optimizer: keras.optimizers.SGD,
    num_steps: int,
    *,
    curvatures: Sequence[float] | np.ndarray | Literal["auto"] = (0.0,),
    curvature_weights: Sequence[float] | np.ndarray | None = None,
) -> Workload:
    """Returns the workload of Keras's SGD with its momentum, weight decay and learning rates.

    Pass it as `workload` to `TrainingPlan.calibrate`, which also takes the optimizer itself. Step
    i uses the learning-rate schedule at `iterations` = i, from 0, whatever `iterations` is now, and
    in the precision in which Keras evaluates it. As in Keras, weight decay is decoupled and
    multiplied by the rate: `w <- w - weight_decay * rate_i * w`, before the step. Rates that
    callbacks set later and constraints of variables are not seen: the strategy is then optimized
    for another workload than the one that is run, which costs accuracy, never privacy.

    Args:
        optimizer: A `keras.optimizers.SGD`: the one that `BandMFOptimizer` wraps, not the wrapper.
        num_steps: n, the number of steps, at least 1.
        curvatures: Of the loss, as in `strategies.Workload`: none unless they are given. They must
            not come from private data. "auto" takes four that depend on the optimizer alone: along
            them, SGD undoes most of the noise of a step within 4 n, n, n / 4 and n / 16 steps. This
            is a rule of thumb, with the results that docs/results.md has.
        curvature_weights: One positive number for each curvature, or None for equal ones.

    Returns:
        The `Workload` of n steps.

    Raises:
        TypeError: `optimizer` is not a Keras optimizer, or `num_steps` is not an integer.
        ValueError: The weights are not linear in the gradients (Adam and similar optimizers,
            clipping, averaged weights), rates are negative, not finite or all zero, or SGD would
            diverge in a direction of one of the curvatures.

    Example:
        >>> import keras
        >>> import keras_bandmf as bandmf
        >>> optimizer = keras.optimizers.SGD(0.5, momentum=0.9)
        >>> workload = bandmf.workload_from_optimizer(optimizer, num_steps=100)
        >>> workload.num_steps, workload.momentum
        (100, 0.9)
        >>> curved = bandmf.workload_from_optimizer(optimizer, 100, curvatures="auto")
        >>> [round(h, 4) for h in curved.curvatures]
        [0.0005, 0.002, 0.008, 0.032]
    """
    num_steps = checked_int("num_steps", num_steps)
    if not isinstance(optimizer, keras.optimizers.Optimizer):
        raise TypeError(
            "Expected `optimizer` to be a `keras.optimizers.SGD`. Received: "
            f"optimizer={optimizer!r} of type {type(optimizer).__name__}. {_WAY_OUT}"
        )
    # A subclass may update in any way.
    if type(optimizer) is not keras.optimizers.SGD:
        raise ValueError(
            "Expected `optimizer` to be a `keras.optimizers.SGD` itself, because only its weights "
            f"are linear in the gradients. Received: an optimizer of class "
            f"{type(optimizer).__name__}. {_WAY_OUT}"
        )
    for name in _REFUSED_SETTINGS:
        if getattr(optimizer, name) is not None:
            _refuse(f"{name}={getattr(optimizer, name)!r}")
    if optimizer.use_ema:
        _refuse("use_ema=True")
    if optimizer.weight_decay and _excludes_variables(optimizer):
        _refuse("variables excluded from weight decay")
    flat = Workload(
        num_steps,
        _rates(optimizer, num_steps),
        momentum=float(optimizer.momentum),
        nesterov=bool(optimizer.nesterov),
        weight_decay=float(optimizer.weight_decay or 0.0),
    )
    if isinstance(curvatures, str):
        checked_choice("curvatures", curvatures, ("auto",), hint="Or pass a list of numbers.")
        curvatures = _spread_curvatures(flat)
    return dataclasses.replace(flat, curvatures=curvatures, curvature_weights=curvature_weights)


def _spread_curvatures(flat: Workload) -> np.ndarray:
    """Returns curvatures that suit the learning rates and the length of the run.

    SGD with learning rate r and a slowly changing gradient moves by r / (1 - momentum) times that
    gradient in each step, so it takes about (1 - momentum) / (r h) steps to undo the noise in a
    direction of curvature h.
    """
    # Never within less than 2 steps, where learning rates are hardly stable.
    steps = np.maximum(2.0, flat.num_steps * np.array(_UNDONE_IN))
    spread = (1.0 - flat.momentum) / (float(np.mean(flat.learning_rates)) * steps)
    largest = float(np.max(flat.learning_rates))
    limit = stable_curvature(largest, flat.momentum, flat.nesterov, flat.weight_decay)
    # A schedule may have far larger rates than its mean.
    return np.minimum(spread, 0.5 * limit)


def _refuse(setting: str) -> NoReturn:
    raise ValueError(
        "Expected `optimizer` to give every variable the same sums of gradients. Received: an SGD "
        f"with {setting}. {_WAY_OUT}"
    )


def _excludes_variables(optimizer: keras.optimizers.SGD) -> bool:
    names = ("_exclude_from_weight_decay", "_exclude_from_weight_decay_pattern")
    return any(getattr(optimizer, name, None) for name in names)


def _rates(optimizer: keras.optimizers.SGD, num_steps: int) -> float | np.ndarray:
    # Keras has no public way to the schedule itself: `learning_rate` is its value at this step.
    rate = getattr(optimizer, "_learning_rate", None)
    if isinstance(rate, keras.optimizers.schedules.LearningRateSchedule):
        return _evaluated(rate, num_steps, optimizer.iterations.dtype)
    if rate is None or (callable(rate) and not isinstance(rate, keras.Variable)):
        _refuse("a function as its learning rate")
    return float(keras.ops.convert_to_numpy(optimizer.learning_rate))


def _evaluated(schedule: Callable[[Any], Any], num_steps: int, dtype: str) -> np.ndarray:
    """Returns the schedule at steps 0 to n - 1, `(n,)` float64."""
    steps = keras.ops.arange(num_steps, dtype=dtype)
    try:
        # Not `schedule(steps)`: schedules may branch on what they take to be one step.
        rates = keras.ops.convert_to_numpy(keras.ops.vectorized_map(schedule, steps))
    except (
        Exception
    ):  # A schedule in plain Python may fail in any way; it is called step by step below.
        rates = None
    if np.shape(rates) != (num_steps,):
        rates = [float(keras.ops.convert_to_numpy(schedule(step))) for step in steps]
    return np.asarray(rates, np.float64)
