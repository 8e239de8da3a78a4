"""What BandMFOptimizer accepts: plan, clip norm, seed, inner optimizer, clipped gradients."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Sequence
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


def checked_inner(optimizer: str | dict | keras.optimizers.Optimizer) -> keras.optimizers.Optimizer:
    """Returns the inner optimizer, after checking that it acts on the noisy sum alone.

    Args:
        optimizer: A name, a config, or an optimizer of Keras 3.

    Raises:
        TypeError: If `optimizer` is none of these.
        ValueError: If one of its settings changes which value is released.
    """
    if isinstance(optimizer, type):
        raise TypeError(
            "Expected `optimizer` to be an optimizer, and not its class. Received: optimizer="
            f"{optimizer.__name__}, without parentheses. Use for example "
            f"`BandMFOptimizer({optimizer.__name__}(learning_rate=...), ...)`."
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
