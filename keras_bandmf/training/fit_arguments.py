"""What a private `fit` accepts: data, arguments and devices the plan accounts for."""

from __future__ import annotations

import itertools
import logging
import types
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from keras_bandmf import _distribution
from keras_bandmf.planning.plan import TrainingPlan
from keras_bandmf.sampling import PrivateBatches

_LOGGER = logging.getLogger(__name__)

# Strategies whose replicas are known when a step is traced, and make it in lockstep.
_SUPPORTED = (
    tf.distribute.OneDeviceStrategy,
    tf.distribute.MirroredStrategy,
    tf.distribute.MultiWorkerMirroredStrategy,
    tf.distribute.experimental.CentralStorageStrategy,
)
_USE = "Use one device, MirroredStrategy, MultiWorkerMirroredStrategy or CentralStorageStrategy."
_REFUSED = {
    tf.distribute.TPUStrategy: "a TPU's replicas are not known by number when the step is traced, "
    "so that each would have to keep and draw the whole noise",
    tf.distribute.ParameterServerStrategy: "its workers update the weights at different times, so "
    "that no step has a sum of all clipped gradients to which its noise belongs",
}


def check_distribution(model: keras.Model, x: Any) -> None:
    """Refuses distribution strategies under which noise or batches are not known to be right.

    Args:
        model: the model.
        x: the data given to `fit`.

    Raises:
        ValueError: naming the strategy.
    """
    strategy = model.distribute_strategy
    name = type(strategy).__name__
    for kind, reason in _REFUSED.items():
        if isinstance(strategy, kind):
            raise ValueError(f"Private training does not run under {name}: {reason}. {_USE}")
    with strategy.scope():
        is_default = not tf.distribute.has_strategy()
    if not is_default and not isinstance(strategy, _SUPPORTED):
        raise ValueError(f"Private training is not known to be right under {name}. {_USE}")
    if strategy.num_replicas_in_sync > 1 and model.steps_per_execution > 1:
        raise ValueError(
            "Keras fails under a strategy with several replicas when `steps_per_execution` is not "
            f"1. Received: steps_per_execution={model.steps_per_execution}"
        )
    if _distribution.is_multi_worker(strategy) and not isinstance(x, PrivateBatches):
        raise ValueError(
            "With several worker processes a private `fit` takes `plan.batches(x, y)`: it splits "
            f"each global batch over the workers exactly once. Received: x of {type(x).__name__}"
        )


def refuse_changed_data(class_weight: dict | None, validation_split: float) -> None:
    """Refuses arguments by which Keras would change the training data.

    Raises:
        ValueError: with the place where the argument belongs.
    """
    if class_weight is not None:
        raise ValueError(
            "`class_weight` goes to the batches: `plan.batches(x, y, class_weight=...)`. "
            f"Received: class_weight={class_weight}"
        )
    if validation_split:
        raise ValueError(
            "`validation_split` changes the number of training examples, which is part of the "
            "plan. Split the data first and pass `validation_data`. "
            f"Received: validation_split={validation_split}"
        )


def check_batches(
    batches: PrivateBatches,
    plan: TrainingPlan,
    y: Any,
    batch_size: int | None,
    shuffle: bool | None,
    sample_weight: Any,
    steps_per_epoch: int | None,
) -> None:
    """Accepts batches of the optimizer's plan, and no argument that would change them.

    Raises:
        ValueError: for batches of another plan, or an argument that belongs to `plan.batches`.
    """
    if batches.plan_fingerprint != plan.fingerprint:
        raise ValueError(
            "The batches must come from the optimizer's plan. Received: batches of plan "
            f"{batches.plan_fingerprint[:12]} with an optimizer of plan "
            f"{plan.fingerprint[:12]}. Use `plan.batches` of the plan the optimizer was given."
        )
    refused = {
        "y": y,
        "batch_size": batch_size,
        "shuffle": shuffle or None,
        "sample_weight": sample_weight,
    }
    for name, value in refused.items():
        if value is not None:
            raise ValueError(
                f"`{name}` belongs to the batches: pass it to `plan.batches`, or to the plan. "
                f"Received: {name} of type {type(value).__name__} in `fit`"
            )
    if steps_per_epoch is not None and not 1 <= steps_per_epoch <= batches.steps_per_epoch:
        raise ValueError(
            f"`steps_per_epoch` must be from 1 to the plan's {batches.steps_per_epoch}. "
            f"Received: steps_per_epoch={steps_per_epoch}"
        )


def check_foreign_data(
    x: Any, plan: TrainingPlan, batch_size: int | None, steps_per_epoch: int | None
) -> tuple[int | None, int | None]:
    """Accepts data that is not of `plan.batches` only where the user vouches for its order.

    Formal guarantees:
        Of arrays, which Keras reads from the first row in each epoch, the declaration is checked;
        of a dataset or generator it is taken on trust, and the statement says so.

    Returns:
        The batch size for Keras, and the steps of an epoch: the plan's and those of the arrays;
        the user's and None for data that brings its batches.

    Raises:
        ValueError: if the plan declares no participations, or arrays break its declaration.
    """
    if not plan.declares_participations:
        raise ValueError(
            "A private `fit` takes what `plan.batches(x, y)` of the optimizer's plan returns: "
            "sampler, noise and accounting come from one plan. "
            f"Received: x of type {type(x).__name__}. For data in a fixed order of your own, "
            "make the plan with sampling='fixed_order' and declare `max_participations` and "
            "`min_separation`."
        )
    leaves = keras.tree.flatten(x)
    if not all(hasattr(leaf, "shape") for leaf in leaves):
        return batch_size, None
    if batch_size not in (None, plan.batch_size):
        raise ValueError(
            f"`batch_size` must be the plan's {plan.batch_size}. Received: batch_size={batch_size}"
        )
    if steps_per_epoch is not None:
        raise ValueError(
            "Arrays are read from the first row in each epoch, so that shorter epochs would repeat "
            f"rows too early. Received: steps_per_epoch={steps_per_epoch}. Leave it out."
        )
    epoch_steps = -(-int(leaves[0].shape[0]) // plan.batch_size)
    passes = -(-plan.num_steps // epoch_steps)
    if epoch_steps < plan.min_separation or passes > plan.max_participations:
        raise ValueError(
            f"The plan declares at most {plan.max_participations} participations of a row, at "
            f"least {plan.min_separation} steps apart. Received: arrays that give {passes} "
            f"participations {epoch_steps} steps apart in {plan.num_steps} steps."
        )
    return plan.batch_size, epoch_steps


def checked_epochs(
    epochs: int | None, initial_epoch: int, steps_left: int, steps_per_epoch: int | None
) -> int:
    """Returns the epochs of a `fit`; says in one line of the log if they leave steps of the plan.

    Args:
        epochs: those asked for, or None for all that are left.
        initial_epoch: where Keras begins to count.
        steps_left: of the plan.
        steps_per_epoch: None if nobody knows.
    """
    if steps_per_epoch is None:
        return initial_epoch + 1 if epochs is None else epochs
    if epochs is None:
        return initial_epoch + -(-steps_left // steps_per_epoch)
    unused = steps_left - (epochs - initial_epoch) * steps_per_epoch
    if unused > 0:
        _LOGGER.warning(
            "This `fit` leaves %d steps of the plan, whose noise is made for all of them. "
            "`epochs=None` trains what is left.",
            unused,
        )
    return epochs


def first_rows(x: Any, y: Any, sample_weight: Any, count: int) -> tuple[dict[str, Any], Any]:
    """Returns a few rows of data that is not of `plan.batches`, to check the model on.

    Returns:
        Dict of `"x"`, `"y"` and `"sample_weight"` of up to `count` rows; and the data to train on:
        `x` itself, or a generator of all that the generator `x` yields.

    Raises:
        ValueError: for data of a kind that cannot be looked at, or without a batch: no model is
            trained unchecked.
    """
    data = x
    if isinstance(x, tf.data.Dataset):
        batch = next(iter(x.take(1)), None)
    elif isinstance(x, keras.utils.PyDataset):
        batch = x[0]
    elif isinstance(x, types.GeneratorType):
        batch = next(x, None)
        data = (each for each in itertools.chain([batch], x))
    elif all(hasattr(leaf, "shape") for leaf in keras.tree.flatten(x)):
        batch = (x, y, sample_weight)
    else:
        batch = None
    if batch is None:
        raise ValueError(
            "Expected data with at least one batch, whose first rows the model can be checked on: "
            "arrays, a `tf.data.Dataset`, a `keras.utils.PyDataset` or a generator. "
            f"Received: x of type {type(x).__name__}"
        )
    x, y, sample_weight = keras.utils.unpack_x_y_sample_weight(batch)

    def head(leaf: Any) -> np.ndarray | None:
        rows = None if leaf is None else np.asarray(leaf[:count])
        is_float = rows is not None and rows.dtype.kind == "f"
        return rows.astype(keras.config.floatx()) if is_float else rows

    parts = {"x": x, "y": y, "sample_weight": sample_weight}
    return {name: keras.tree.map_structure(head, part) for name, part in parts.items()}, data
