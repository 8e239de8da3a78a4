"""What BandMFOptimizer accepts: plan, clip norm, seed, inner optimizer, clipped gradients."""

from __future__ import annotations

import hashlib
import json
import math
import numbers
from collections.abc import Sequence
from typing import Any

import keras

from keras_bandmf.clipping import ClippedGradients, ClippingMode
from keras_bandmf.clipping.norms import refuse_clip_norm
from keras_bandmf.plan import TrainingPlan

# Settings of the base optimizer that would act on one replica's share of the noisy sum, or skip
# and merge steps: with any of them the released value is not what the plan accounts for.
_REFUSED_SETTINGS = {
    "clipnorm": "Gradients are clipped per example: set `l2_norm_clip`.",
    "clipvalue": "Gradients are clipped per example: set `l2_norm_clip`.",
    "global_clipnorm": "Gradients are clipped per example: set `l2_norm_clip`.",
    "gradient_accumulation_steps": "Use `privatize(model, microbatch_size=...)` to save memory.",
    "loss_scale_factor": "Use the dtype policy 'mixed_bfloat16', which needs no loss scaling.",
}


def check_arguments(plan: Any, l2_norm_clip: Any, seed: Any) -> None:
    """Refuses arguments of the wrong type or range.

    Raises:
        TypeError: if `plan` is not a plan.
        ValueError: naming the argument.
    """
    if not isinstance(plan, TrainingPlan):
        raise TypeError(
            "Argument `plan` must be a keras_bandmf.TrainingPlan, for example from "
            f"`TrainingPlan.calibrate(...)`. Received: plan={plan!r}"
        )
    if (
        isinstance(l2_norm_clip, bool)
        or not isinstance(l2_norm_clip, numbers.Real)
        or not 0 < l2_norm_clip < math.inf
    ):
        raise ValueError(
            "Argument `l2_norm_clip` must be a positive finite number. "
            f"Received: l2_norm_clip={l2_norm_clip!r}"
        )
    refuse_clip_norm(l2_norm_clip)
    if seed is not None and (
        isinstance(seed, bool) or not isinstance(seed, numbers.Integral) or seed < 0
    ):
        raise ValueError(
            "Argument `seed` must be None (a private run) or a non-negative integer (a test). "
            f"Received: seed={seed!r}"
        )


def check_clipped(clipped: Any, l2_norm_clip: float, clipping: ClippingMode) -> None:
    """Accepts gradients clipped just as the optimizer says, and nothing else.

    Raises:
        TypeError: if `clipped` is not `ClippedGradients`.
        ValueError: if they were clipped at another norm or in another mode.
    """
    if not isinstance(clipped, ClippedGradients):
        raise TypeError(
            "BandMFOptimizer takes gradients only as ClippedGradients, from "
            "`keras_bandmf.clipped_gradients(model, x, y, l2_norm_clip=...)`. "
            f"Received: {type(clipped).__name__}"
        )
    if clipped.l2_norm_clip != l2_norm_clip:
        raise ValueError(
            "The gradients must be clipped at the optimizer's norm: the noise is scaled to "
            f"l2_norm_clip={l2_norm_clip}. Received: gradients clipped at {clipped.l2_norm_clip}"
        )
    if clipped.clipping != clipping:
        raise ValueError(
            "The gradients must be clipped in the optimizer's mode, which is fixed for the run and "
            "named in the statement: pass `clipping=optimizer.clipping` to `clipped_gradients`. "
            f"Expected: {clipping}. Received: gradients clipped by {clipped.clipping}"
        )


def check_accounted(plan: TrainingPlan, source: str | None) -> None:
    """Refuses gradients of which nobody knows how their batch was sampled.

    Args:
        plan: the plan of the run.
        source: the batches of the private `fit` whose step this is; None outside one.

    Raises:
        ValueError: naming what to do.
    """
    if source is None and not plan.declares_participations:
        raise ValueError(
            "The sampling of these gradients is not accounted for. Train with "
            "`model.fit(plan.batches(x, y))`; for other data or a loop of your own, make the "
            "plan with sampling='fixed_order' and declare `max_participations` and "
            "`min_separation`."
        )


def run_fingerprint(optimizer: Any, variables: Sequence[Any], carriers: Any) -> str:
    """SHA-256, in hex, of what the saved state of an optimizer belongs to.

    Args:
        optimizer: a `BandMFOptimizer`.
        variables: those it trains.
        carriers: the description of their low-rank carriers, JSON values.
    """
    content = {
        "plan": optimizer.plan.fingerprint,
        "l2_norm_clip": optimizer.l2_norm_clip,
        "clipping": [type(optimizer.clipping).__name__, optimizer.clipping.get_config()],
        "inner_optimizer": type(optimizer.inner_optimizer).__name__,
        "variables": [[list(v.shape), str(v.dtype)] for v in variables],
        "carriers": carriers,
    }
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def checked_inner(optimizer: str | dict | keras.optimizers.Optimizer) -> keras.optimizers.Optimizer:
    """Returns an inner optimizer that acts on the noisy sum alone.

    Raises:
        TypeError: if `optimizer` is no name, config or Keras 3 optimizer.
        ValueError: naming the setting that does not.
    """
    if not isinstance(optimizer, (str, dict, keras.optimizers.Optimizer)):
        raise TypeError(
            "Argument `optimizer` must be a name, a config, or a keras.optimizers.Optimizer of "
            "Keras 3 (`import keras`, not `tf.keras`, which `import tensorflow_transform` makes "
            f"Keras 2). Received: {type(optimizer).__module__}.{type(optimizer).__name__}"
        )
    inner = keras.optimizers.get(optimizer)
    wraps = hasattr(inner, "inner_optimizer")  # LossScaleOptimizer, and a second BandMFOptimizer
    if wraps:
        raise ValueError(
            "The inner optimizer must be an ordinary Keras optimizer such as 'adam'. "
            f"Received: optimizer={type(inner).__name__}"
        )
    for name, advice in _REFUSED_SETTINGS.items():
        value = getattr(inner, name, None)
        if value is not None:
            raise ValueError(
                f"The inner optimizer must not set `{name}`. {advice} Received: {name}={value}"
            )
    if inner.use_ema and inner.ema_overwrite_frequency:
        raise ValueError(
            "The inner optimizer must not set `ema_overwrite_frequency`: Keras fails on it under "
            "a distribution strategy. The average is written at the end of `fit` without it. "
            f"Received: ema_overwrite_frequency={inner.ema_overwrite_frequency}"
        )
    return inner
