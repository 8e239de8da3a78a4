"""What a private `fit` accepts: data, arguments and devices that the plan accounts for."""

from __future__ import annotations

import contextlib
import itertools
import logging
import types
from collections.abc import Iterator
from typing import Any, NamedTuple

import keras
import numpy as np
import tensorflow as tf

from keras_bandmf import _distribution
from keras_bandmf._checks import PrivacyError, checked_int
from keras_bandmf._keras_internals import compiled_loss
from keras_bandmf.planning.plan import TrainingPlan
from keras_bandmf.planning.units import ROW
from keras_bandmf.sampling import PrivateBatches

_LOGGER = logging.getLogger(__name__)

# Distributions whose replicas are known when a step is traced, and make the step in lockstep.
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


def check_distribution(model: keras.Model, own_order: bool) -> None:
    """Refuses distributions under which noise or batches are not known to be right.

    Args:
        model: The model.
        own_order: Whether the data comes in an order of the user's own.

    Raises:
        ValueError: If the distribution is not supported, or not together with such data or the
            settings of the model.
    """
    distribution = model.distribute_strategy
    name = type(distribution).__name__
    for kind, reason in _REFUSED.items():
        if isinstance(distribution, kind):
            raise ValueError(f"Private training does not run under {name}: {reason}. {_USE}")
    with distribution.scope():
        is_default = not tf.distribute.has_strategy()
    if not is_default and not isinstance(distribution, _SUPPORTED):
        raise ValueError(f"Private training is not known to be right under {name}. {_USE}")
    if distribution.num_replicas_in_sync > 1 and model.steps_per_execution > 1:
        raise ValueError(
            "Keras fails on several replicas unless `steps_per_execution` is 1. "
            f"Received: steps_per_execution={model.steps_per_execution}"
        )
    if own_order and _distribution.is_multi_worker(distribution):
        raise ValueError(
            "With several worker processes a private `fit` trains on batches that the plan draws, "
            "`plan.batches(x, y)`: they are split over the workers, so that each row is used once. "
            "Received: data in an order of your own, as the plan declares"
        )


def check_lengths(epochs: Any, initial_epoch: Any, steps_per_epoch: Any) -> None:
    """Refuses lengths of a `fit` that are no numbers.

    Args:
        epochs: The argument of `fit`, as are the others.
        initial_epoch: See `epochs`.
        steps_per_epoch: See `epochs`.

    Raises:
        TypeError: If one is no integer.
        ValueError: If one is negative, or `steps_per_epoch` is zero.
    """
    checked_int("initial_epoch", initial_epoch, 0)
    if epochs is not None:
        checked_int("epochs", epochs, 0, "None trains what is left of the plan.")
    if steps_per_epoch is not None:
        checked_int("steps_per_epoch", steps_per_epoch, hint="None takes the plan's.")


def check_trainable(model: keras.Model, y: Any) -> None:
    """Refuses a `fit` without a loss, or without the targets that it is computed from.

    Args:
        model: The compiled model.
        y: The targets of a few rows, or None.

    Raises:
        ValueError: If one is missing. A `compute_loss` of the model's own needs neither.
    """
    if type(model).compute_loss is not keras.Model.compute_loss or "compute_loss" in vars(model):
        return
    if compiled_loss(model) is None:
        raise ValueError(
            "A private `fit` needs a loss of which each example has a gradient. Received: a model "
            "that was compiled with loss=None. Use `model.compile(optimizer=..., loss=...)`."
        )
    if y is None:
        raise ValueError(
            "Expected `y`, because the model was compiled with a loss that compares outputs with "
            "targets. Received: y=None. Use `model.fit(x, y)`, `plan.batches(x, y)`, or a dataset "
            "of (x, y)."
        )


@contextlib.contextmanager
def explained() -> Iterator[None]:
    """Says of an error of TensorFlow that it was the first rows, and shows no graph.

    Raises:
        ValueError: In place of an error of TensorFlow about a value.
    """
    try:
        yield
    except (tf.errors.InvalidArgumentError, tf.errors.UnimplementedError) as error:
        says = [line.strip() for line in error.message.splitlines() if line.strip()]
        cause = [line for line in says if "{{node" not in line][-1:]
        raise ValueError(
            "The model or its loss fails on the first rows, which was found before the first step. "
            "Often a label is not below the number of outputs, or an entry not below the size of "
            f"an Embedding. Received: rows of which TensorFlow says: {' '.join(cause)}"
        ) from error


def refuse_changed_data(class_weight: dict | None, validation_split: float) -> None:
    """Refuses arguments by which Keras would change batches, or data in the user's own order.

    Args:
        class_weight: The argument of `fit`.
        validation_split: The argument of `fit`.

    Raises:
        ValueError: If one of them is set.
    """
    if class_weight is not None:
        raise ValueError(
            "Pass `class_weight` to the batches: `plan.batches(x, y, class_weight=...)`, or arrays "
            "to `fit` of a plan that declares no participations. "
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

    Args:
        batches: The batches given to `fit`.
        plan: The plan of the optimizer.
        y: This and the following are arguments of `fit`.
        batch_size: See `y`.
        shuffle: See `y`.
        sample_weight: See `y`.
        steps_per_epoch: See `y`.

    Raises:
        ValueError: If the batches are of another plan, or an argument belongs to `plan.batches`.
    """
    if batches.plan_fingerprint != plan.fingerprint:
        raise ValueError(
            "The batches must come from the optimizer's plan. Received: batches of plan "
            f"{batches.plan_fingerprint[:12]} with an optimizer of plan "
            f"{plan.fingerprint[:12]}. Use `plan.batches` of the plan that the optimizer was given."
        )
    if batches.counts_units != (plan.unit != ROW):
        raise PrivacyError(
            f"The batches must count what the plan counts, which is one {plan.unit}. Received: "
            f"batches of {'units' if batches.counts_units else 'rows'}. Make them by "
            "`plan.batches`."
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
    """Accepts data that is not from `plan.batches` only where the user vouches for its order.

    Formal guarantees:
        For arrays, which Keras reads from the first row in each epoch, the declaration is checked.
        For a dataset or generator it is taken on trust, and the statement says so.

    Args:
        x: The data given to `fit`.
        plan: The plan of the optimizer.
        batch_size: The argument of `fit`.
        steps_per_epoch: The argument of `fit`.

    Returns:
        The batch size to pass to Keras, and the steps of an epoch. For arrays these are the plan's
        batch size and the steps of one pass; for data that brings its own batches, `batch_size`
        and None.

    Raises:
        ValueError: If the plan declares no participations, or arrays break its declaration.
    """
    separation, participations = plan.min_separation, plan.max_participations
    if separation is None or participations is None:  # the plan declares both or neither
        raise ValueError(
            "Data in an order of the user's own needs a plan with sampling='fixed_order' that "
            f"declares `max_participations` and `min_separation`. Received: x of type "
            f"{type(x).__name__} with a plan that declares neither."
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
            "Keras reads arrays from the first row in each epoch, so shorter epochs would repeat "
            f"rows too early. Received: steps_per_epoch={steps_per_epoch}. Leave it out."
        )
    epoch_steps = -(-int(leaves[0].shape[0]) // plan.batch_size)
    passes = -(-plan.num_steps // epoch_steps)
    if epoch_steps < separation or passes > participations:
        raise ValueError(
            f"The plan declares at most {participations} participations of a row, at "
            f"least {separation} steps apart. Received: arrays that give {passes} "
            f"participations {epoch_steps} steps apart in {plan.num_steps} steps. Declare these "
            "numbers in the plan."
        )
    return plan.batch_size, epoch_steps


def checked_epochs(
    epochs: int | None, initial_epoch: int, steps_left: int, steps_per_epoch: int | None
) -> int:
    """Returns the epochs of a `fit`, and logs a warning if they leave steps of the plan unused.

    Args:
        epochs: The epochs that were asked for, or None for what is left of the plan.
        initial_epoch: The epoch at which Keras begins to count.
        steps_left: The steps of the plan that are left.
        steps_per_epoch: The steps of an epoch, or None if they are unknown.

    Returns:
        The `epochs` argument for Keras. None with an unknown number of steps becomes one epoch.
    """
    if steps_per_epoch is None:
        return initial_epoch + 1 if epochs is None else epochs
    if epochs is None:
        return initial_epoch + -(-steps_left // steps_per_epoch)
    if epochs - initial_epoch > -(-steps_left // steps_per_epoch) > 0:
        _LOGGER.warning(
            "`fit` ends when the %d steps that are left of the plan are made. Received: epochs=%d, "
            "which is more. `epochs=None` trains what is left.",
            steps_left,
            epochs,
        )
    unused = steps_left - (epochs - initial_epoch) * steps_per_epoch
    if unused > 0:
        _LOGGER.warning(
            "This `fit` leaves %d steps of the plan unused, but its noise is made for all steps. "
            "`epochs=None` trains what is left.",
            unused,
        )
    return epochs


class FirstRows(NamedTuple):
    """A few rows of data that is not from `plan.batches`.

    Attributes:
        rows: A dict of `"x"`, `"y"` and `"sample_weight"`: structures of arrays, or None.
        data: The data to train on, with those rows still in it.
    """

    rows: dict[str, Any]
    data: Any


def first_rows(x: Any, y: Any, sample_weight: Any, count: int) -> FirstRows:
    """Returns a few rows of data that is not from `plan.batches`, to check the model on.

    Args:
        x: The data given to `fit`.
        y: The argument of `fit`.
        sample_weight: The argument of `fit`.
        count: The largest number of rows.

    Returns:
        The rows, and the data to train on: `x` itself, or for a generator another one that yields
        the same.

    Raises:
        ValueError: If the data is of a kind that cannot be looked at, or has no batch. No model is
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
            "Expected data with at least one batch, on whose rows the model can be checked: "
            "arrays, a `tf.data.Dataset`, a `keras.utils.PyDataset` or a generator. "
            f"Received: x of type {type(x).__name__}"
        )
    x, y, sample_weight = keras.utils.unpack_x_y_sample_weight(batch)

    def head(leaf: Any) -> np.ndarray | None:
        if leaf is None:
            return None
        rows = np.asarray(leaf[:count])
        return rows.astype(keras.config.floatx()) if rows.dtype.kind == "f" else rows

    parts = {"x": x, "y": y, "sample_weight": sample_weight}
    rows = {name: keras.tree.map_structure(head, part) for name, part in parts.items()}
    return FirstRows(rows, data)
