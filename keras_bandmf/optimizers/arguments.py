"""What BandMFOptimizer accepts: plan, clip norm, seed, inner optimizer, clipped gradients."""

from __future__ import annotations

import copy
import hashlib
import inspect
import json
import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

import keras
import tensorflow as tf

from keras_bandmf._checks import PrivacyError, checked_bool, checked_choice, checked_int
from keras_bandmf.clipping import ClippedGradients, ClippingMode
from keras_bandmf.clipping.norms import checked_clip_norm, largest_contribution
from keras_bandmf.noise.finite import check_tail
from keras_bandmf.noise.lattice import charged_norm
from keras_bandmf.noise.regenerated import refuse_exact
from keras_bandmf.planning.plan import TrainingPlan
from keras_bandmf.planning.plan_target import CalibrationOptions
from keras_bandmf.planning.secret_group import rounding_factor

if TYPE_CHECKING:
    from keras_bandmf.optimizers.bandmf import BandMFOptimizer

#: How noise is rounded to its lattice.
NoiseMode = Literal["default", "exact"]

# Settings of the base optimizer that would act on one replica's share of the noisy sum, or skip
# and merge steps: with any of them the released value is not what the plan accounts for.
_REFUSED_SETTINGS = {
    "clipnorm": "Gradients are clipped per example: set `l2_norm_clip`.",
    "clipvalue": "Gradients are clipped per example: set `l2_norm_clip`.",
    "global_clipnorm": "Gradients are clipped per example: set `l2_norm_clip`.",
    "gradient_accumulation_steps": "Use `privatize(model, microbatch_size=...)` to save memory.",
    "loss_scale_factor": "Use the dtype policy 'mixed_bfloat16', which needs no loss scaling.",
}
_OF_ALL = inspect.signature(keras.optimizers.Optimizer).parameters.keys()


def check_arguments(
    plan: Any, l2_norm_clip: Any, seed: Any, noise: Any = "default", replay: Any = False
) -> None:
    """Refuses arguments of `BandMFOptimizer` of the wrong type or out of range.

    Args:
        plan: See `BandMFOptimizer`, as for the other arguments. None where it is made later.
        l2_norm_clip: See `plan`.
        seed: See `plan`.
        noise: See `plan`.
        replay: See `plan`.

    Raises:
        TypeError: If an argument is of the wrong type.
        ValueError: If an argument is out of range.
    """
    if plan is not None and not isinstance(plan, TrainingPlan):
        raise TypeError(
            "Expected `plan` to be a keras_bandmf.TrainingPlan, for example from "
            f"`TrainingPlan.calibrate(...)`. Received: plan={plan!r}"
        )
    checked_clip_norm(l2_norm_clip)
    checked_bool("replay", replay)
    checked_choice("noise", noise, ("default", "exact"))
    if noise == "exact" and plan is not None:  # one that is made later has bands
        refuse_exact(plan.strategy)
    if seed is not None:
        checked_int("seed", seed, 0, "It is for tests; None (the default) is a private run.")


def noise_stddev(
    plan: TrainingPlan,
    clipping: ClippingMode,
    l2_norm_clip: float,
    shapes: Sequence[Sequence[int]],
    float64_sums: bool,
) -> float:
    """Returns the standard deviation of `Z`, at a norm that includes what rounding costs.

    Formal guarantees:
        See `lattice.charged_norm` and `norms.largest_contribution`, and for plans with a
        certificate `rounding_factor`; the cut tail of the noise costs less than the share of
        delta set aside for it.

    Args:
        plan: The plan of the run.
        clipping: The clipping mode of the run.
        l2_norm_clip: The clip norm of the run.
        shapes: The shapes of the released gradients.
        float64_sums: Whether `check_clipped` demands sums in float64.

    Returns:
        The plan's noise multiplier times its sensitivity times that norm.

    Raises:
        ValueError: If the plan's delta cannot pay for the tail, or float32 or the lattice cannot
            hold noise and gradients.
    """
    size = sum(math.prod(shape) for shape in shapes)
    check_tail(float(size) * plan.num_steps, plan.delta)
    bound, least = clipping.sensitivity(l2_norm_clip), clipping.least_norm(l2_norm_clip)
    norm = charged_norm(
        largest_contribution(bound, least, len(shapes)),
        plan.strategy,
        plan.noise_stddev(1.0),
        size,
        math.ceil(plan.schedule.expected_batch_size),
        float64_sums,
    )
    stddev = plan.noise_stddev(norm)
    if plan.certificate is None:
        return stddev
    return stddev * rounding_factor(plan.strategy, stddev, l2_norm_clip, size)


def fingerprint(
    optimizer: BandMFOptimizer, variables: Sequence[keras.Variable], coordinates: list
) -> str:
    """Returns a digest of the run that a checkpoint of the optimizer's state belongs to.

    Args:
        optimizer: The optimizer.
        variables: The variables that it is built with.
        coordinates: A description of the coordinates in which gradients are released.

    Returns:
        A SHA-256 digest in hexadecimal digits.
    """
    content = {
        "plan": optimizer.plan.fingerprint,
        "l2_norm_clip": optimizer.l2_norm_clip,
        "clipping": [type(optimizer.clipping).__name__, optimizer.clipping.get_config()],
        "inner_optimizer": type(optimizer.inner_optimizer).__name__,
        "variables": [[list(v.shape), str(v.dtype)] for v in variables],
        "carriers": coordinates,
        "noise": optimizer.noise,
    }
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def check_clipped(
    clipped: Any, l2_norm_clip: float, clipping: ClippingMode, float64_sums: bool
) -> None:
    """Refuses everything but gradients that were clipped as the optimizer says.

    Args:
        clipped: The gradients.
        l2_norm_clip: The clip norm of the optimizer.
        clipping: The clipping mode of the optimizer.
        float64_sums: Whether the noise is scaled to sums in float64.

    Raises:
        TypeError: If `clipped` is not `ClippedGradients`.
        PrivacyError: If they were clipped at another norm or in another mode, or summed in float32
            although the noise is scaled to sums in float64.
    """
    if not isinstance(clipped, ClippedGradients):
        raise TypeError(
            "BandMFOptimizer takes gradients only as ClippedGradients, from "
            "`keras_bandmf.clipped_gradients(model, x, y, l2_norm_clip=...)`. "
            f"Received: {type(clipped).__name__}"
        )
    if clipped.l2_norm_clip != l2_norm_clip:
        raise PrivacyError(
            "The gradients must be clipped at the optimizer's norm: the noise is scaled to "
            f"l2_norm_clip={l2_norm_clip}. Received: gradients clipped at {clipped.l2_norm_clip}"
        )
    if clipped.clipping != clipping:
        raise PrivacyError(
            "The gradients must be clipped in the optimizer's mode, which is fixed for the run and "
            "named in the statement: pass `clipping=optimizer.clipping` to `clipped_gradients`. "
            f"Expected: {clipping}. Received: gradients clipped by {clipped.clipping}"
        )
    if float64_sums and any(total.dtype != tf.float64 for total in clipped.sums):
        raise PrivacyError(
            'With `noise="exact"` gradients must be summed in float64: pass `float64_sums=True` to '
            "`clipped_gradients`. Received: sums of "
            f"{sorted({total.dtype.name for total in clipped.sums})}"
        )


def check_origin(clipped: ClippedGradients, variables: Sequence[keras.Variable]) -> None:
    """Refuses gradients of other variables than those that are to be updated.

    Args:
        clipped: The gradients.
        variables: The variables.

    Raises:
        PrivacyError: If they differ, or their order.
    """
    if not clipped.origin.belongs_to(variables):
        raise PrivacyError(
            "The gradients must be those of the variables they update, taken at their values "
            "and in the same order. Pass the model itself to `clipped_gradients`, and "
            "its `trainable_variables` here. Received: gradients of "
            f"{[v.path for v in clipped.origin.variables]} for {[v.path for v in variables]}"
        )


def check_noised(variables: Sequence[keras.Variable], noised: tuple[int, ...]) -> None:
    """Refuses variables for which the noise was not made.

    Args:
        variables: The variables that are to be updated.
        noised: The ids of those that the optimizer was built with.

    Raises:
        PrivacyError: If they differ, or their order.
    """
    if tuple(id(variable) for variable in variables) != noised:
        raise PrivacyError(
            "`trainable_variables` must be the variables that the optimizer was built with, in "
            "the same order. Did a layer's `trainable` change during the run? Received: "
            f"{[variable.path for variable in variables]}"
        )


def check_accounted(plan: TrainingPlan, source: str | None, rows_per_example: int) -> None:
    """Refuses gradients of a batch whose sampling is unknown.

    Args:
        plan: The plan of the run.
        source: The batches of the private `fit` that makes this step. None outside a `fit`.
        rows_per_example: The number of rows that were clipped together as one example.

    Raises:
        PrivacyError: If there is no `fit`, and the plan declares no participations, or several rows
            were clipped as one: nobody would know that they belong to one person.
    """
    if source is None and rows_per_example != 1:
        raise PrivacyError(
            "Outside of `fit` every example has one row, because nothing shows that several rows "
            f"belong to one. Received: gradients with rows_per_example={rows_per_example}. Train "
            "with `model.fit(plan.batches(x, y, augment=..., augment_copies=...))`, or with "
            "`unit=` for users with several rows."
        )
    if source is None and not plan.declares_participations:
        raise PrivacyError(
            "The sampling of these gradients is not accounted for. Train with "
            "`model.fit(plan.batches(x, y))`; for other data or a loop of your own, make the "
            "plan with sampling='fixed_order' and declare `max_participations` and "
            "`min_separation`."
        )


def checked_inner(
    optimizer: Any, plan: Any = None, options: Mapping[str, Any] | None = None
) -> keras.optimizers.Optimizer:
    """Returns the inner optimizer, which the noisy gradients are passed to.

    Formal guarantees:
        Keras's base optimizer clips, skips, merges or scales steps by its settings, and some of
        that happens on one replica's share of the noisy sum. All such settings are refused, so
        that the inner optimizer is a function of the whole noisy sum alone.

    Args:
        optimizer: A name, a config, or an optimizer of Keras 3.
        plan: What `BandMFOptimizer` was given as `plan`; only its presence is looked at.
        options: The arguments that `BandMFOptimizer` does not name. Those of a Keras optimizer
            are refused.

    Returns:
        The optimizer.

    Raises:
        TypeError: If `optimizer` is none of these, or an argument belongs to it.
        ValueError: If one of its settings changes which value is released.
    """
    if isinstance(optimizer, (int, float)) and not isinstance(optimizer, bool):
        optimizer, options = None, {"learning_rate": optimizer, **(options or {})}
    _refuse_inner_arguments(
        optimizer, "epsilon=..., delta=..." if plan is None else "plan", options
    )
    if isinstance(optimizer, type):
        raise TypeError(
            "Expected `optimizer` to be an optimizer, and not its class. Received: optimizer="
            f"{optimizer.__name__}, without parentheses. Use for example "
            f"`BandMFOptimizer({_name(optimizer)}(learning_rate=...), ...)`."
        )
    if not isinstance(optimizer, (str, dict, keras.optimizers.Optimizer)):
        raise TypeError(
            "Expected `optimizer` to be a name, a config, or a keras.optimizers.Optimizer of "
            "Keras 3. Use `import keras`, not `tf.keras`: `import tensorflow_transform` turns the "
            "latter into Keras 2. Received: optimizer of type "
            f"{type(optimizer).__module__}.{type(optimizer).__name__}"
        )
    try:
        inner = keras.optimizers.get(optimizer)
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(
            "Expected `optimizer` to be the name of an optimizer of Keras, such as 'adam', or the "
            f"config of one. Received: optimizer={optimizer!r}."
        ) from error
    wraps = hasattr(inner, "inner_optimizer")  # LossScaleOptimizer, and a second BandMFOptimizer
    if wraps:
        raise ValueError(
            "The inner optimizer must be an ordinary Keras optimizer such as 'adam'. "
            f"Received: optimizer={type(inner).__name__}"
        )
    for name, advice in _REFUSED_SETTINGS.items():
        value = getattr(inner, name, None)
        if value is not None:
            raise PrivacyError(
                f"The inner optimizer must not set `{name}`. {advice} Received: {name}={value}"
            )
    if inner.use_ema and inner.ema_overwrite_frequency:
        raise ValueError(
            "The inner optimizer must not set `ema_overwrite_frequency`: Keras fails on it when "
            "training is distributed. The average is written at the end of `fit` without it. "
            f"Received: ema_overwrite_frequency={inner.ema_overwrite_frequency}"
        )
    return inner


def _refuse_inner_arguments(optimizer: Any, target: str, options: Mapping[str, Any] | None) -> None:
    """Refuses arguments of a Keras optimizer beside it or in its place, with the line to write.

    Args:
        optimizer: The optimizer, or None.
        target: The arguments for the plan, as they are to be written.
        options: The arguments that `BandMFOptimizer` does not name.

    Raises:
        TypeError: There are some, or there is no optimizer.
    """
    options = options or {}
    if optimizer is not None and options.keys() <= CalibrationOptions.__annotations__.keys():
        return
    kind = _kind(optimizer, options)
    known = _settings(kind) | _settings(keras.optimizers.SGD) | _settings(keras.optimizers.Adam)
    given = {name: value for name, value in options.items() if name in known}
    if optimizer is not None and not given:
        return
    passed = {name: _written(value, "...") for name, value in given.items()}
    refused = [name for name in passed if name in _REFUSED_SETTINGS]
    inner = [f"{name}={value}" for name, value in passed.items() if name not in refused]
    if optimizer is None and not inner:
        inner = ["learning_rate=..."]
    if isinstance(optimizer, keras.optimizers.Optimizer) or not inner:
        inner.append("...")  # the arguments that it has
    first = repr(optimizer) if isinstance(optimizer, str) and inner == ["..."] else ""
    first = first or f"{_name(kind)}({', '.join(inner)})"
    clip = ["l2_norm_clip=..."] * any("clip" in name for name in refused)
    what = [f"{name}={_written(each, type(each).__name__)}" for name, each in given.items()]
    if optimizer is None:
        what.append("no `optimizer`")
    advice = "".join(f" `{name}`: {_REFUSED_SETTINGS[name]}" for name in refused)
    raise TypeError(
        "Expected `optimizer` to be the Keras optimizer that BandMFOptimizer wraps, with its own "
        f"arguments, such as the learning rate. Received: {', '.join(what)}. Use "
        f"`BandMFOptimizer({', '.join([first, target, *clip])})`.{advice}"
    )


def _kind(optimizer: Any, options: Mapping[str, Any]) -> type[keras.optimizers.Optimizer]:
    """Returns the class of an optimizer, however it is given; where it is not, one to propose."""
    if isinstance(optimizer, type) and issubclass(optimizer, keras.optimizers.Optimizer):
        return optimizer
    if isinstance(optimizer, keras.optimizers.Optimizer):
        return type(optimizer)
    if optimizer is not None:
        try:
            return type(keras.optimizers.get(copy.deepcopy(optimizer)))  # Keras changes a config
        except (KeyError, TypeError, ValueError):
            pass
    adam = options.keys() & (_settings(keras.optimizers.Adam) - _settings(keras.optimizers.SGD))
    return keras.optimizers.Adam if adam else keras.optimizers.SGD


def _settings(kind: type[keras.optimizers.Optimizer]) -> set[str]:
    """Returns the arguments that a class of Keras optimizers takes, and that all of them take."""
    named = {*inspect.signature(kind).parameters, *_OF_ALL}
    return named - {"self", "name", "args", "kwargs"}


def _name(kind: type) -> str:
    """Returns a class as it is written in a call."""
    own = kind.__module__.split(".")[0] == "keras"
    return f"keras.optimizers.{kind.__name__}" if own else kind.__name__


def _written(value: Any, other: str) -> str:
    """Returns a value as it is written in a call; `other` for what cannot be."""
    return repr(value) if isinstance(value, (bool, int, float, str, type(None))) else other
