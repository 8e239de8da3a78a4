"""From rows given to `fit`, as in Keras, to the batches of the optimizer's plan."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable
from typing import Any, Literal, NamedTuple

import keras
import tensorflow as tf

from keras_bandmf._checks import checked_bool, checked_float, checked_int
from keras_bandmf.optimizers import BandMFOptimizer
from keras_bandmf.planning.plan import TrainingPlan
from keras_bandmf.planning.plan_target import PlanTarget
from keras_bandmf.planning.progress import ProgressBar, show
from keras_bandmf.planning.units import ROW
from keras_bandmf.record.composition import HELD_OUT
from keras_bandmf.sampling import PrivateBatches
from keras_bandmf.sampling.sources import leaves, unpacked

# As in Keras.
_BATCH_SIZE = 32
_EPOCHS = 1

Way = Literal["batches", "rows", "own order"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Asked:
    """Arguments of `fit`: what to train on, and for how long.

    Attributes:
        x: See `keras.Model.fit`, as for the others.
        y: See `x`.
        sample_weight: See `x`.
        class_weight: See `x`.
        validation_split: See `x`.
        validation_data: See `x`.
        batch_size: See `x`.
        shuffle: See `x`.
        epochs: See `x`.
        initial_epoch: See `x`.
        steps_per_epoch: See `x`.
        verbose: See `x`.
    """

    x: Any
    y: Any
    sample_weight: Any
    class_weight: dict | None
    validation_split: float
    validation_data: Any
    batch_size: int | None
    shuffle: bool | None
    epochs: int | None
    initial_epoch: int
    steps_per_epoch: int | None
    verbose: Any


class OwnBatches(NamedTuple):
    """What `batches_of_rows` returns.

    Attributes:
        batches: The batches to train on.
        validation_data: What was split off, or what `fit` was given.
        remarks: What the reader of the statement must know about the rows.
    """

    batches: PrivateBatches
    validation_data: Any
    remarks: list[str]


def way_of(x: Any, optimizer: BandMFOptimizer) -> Way:
    """Returns how a private `fit` takes its data. The plan decides, not the data.

    Formal guarantees:
        Data reaches Keras in the user's own order only if the plan declares participations, which
        only plans in a fixed order do. Any other plan, and one that is yet to be made, draws its
        batches itself.

    Args:
        x: The data given to `fit`.
        optimizer: The optimizer of the model.

    Returns:
        "batches" for what `plan.batches` returned; "own order" for any other data if the plan
        declares participations; else "rows".
    """
    if isinstance(x, PrivateBatches):
        return "batches"
    held = optimizer.plan_of_run
    return "own order" if held.known and held.plan.declares_participations else "rows"


def batches_of_rows(
    asked: Asked,
    model: keras.Model,
    optimizer: BandMFOptimizer,
    callbacks: Iterable[keras.callbacks.Callback] = (),
) -> OwnBatches:
    """Returns the batches of the optimizer's plan for rows that were given to `fit`.

    If the optimizer has a target in place of a plan, the plan is made and set here.

    Formal guarantees:
        The batches are those of `plan.batches` for the same rows, so that sampler, digest and
        statement are the same. Which rows are split off depends on their number alone.

    Args:
        asked: The arguments of `fit`.
        model: The model.
        optimizer: Its optimizer.
        callbacks: The callbacks of `fit`.

    Returns:
        Batches, validation data, and remarks for the statement.

    Raises:
        TypeError: If the data is of another kind, or an argument has the wrong type.
        ValueError: If a number does not agree with the plan, or the data is unusable.
    """
    held, rows = optimizer.plan_of_run, (asked.x, asked.y, asked.sample_weight)
    validation_data, remarks = asked.validation_data, list[str]()
    _check_shuffle(asked.shuffle)
    if isinstance(asked.x, tf.data.Dataset):
        if asked.validation_split:
            raise ValueError(
                "`validation_split` splits arrays. Split the dataset (`take` and `skip`) and pass "
                f"`validation_data`. Received: validation_split={asked.validation_split}"
            )
        count = total = _examples_of(asked.x, model, held.known)
    else:
        total = _count(*rows)
        count, rows, validation_data, remarks = _split(asked, total)
    if held.target is None or held.known:
        _check_numbers(asked, optimizer, count, total, callbacks)
        batches = held.plan.batches(*rows, class_weight=asked.class_weight)
    else:
        plan = _calibrated(asked, held.target, optimizer, count)
        batches = plan.batches(*rows, class_weight=asked.class_weight)
        held.settle(plan)
        show(
            f"BandMFOptimizer was given no plan, and made one for {plan.num_examples} rows, batch "
            f"size {plan.batch_size} and {plan.num_steps} steps, which are taken as public:\n"
            f"{plan}",
            asked.verbose,
        )
    return OwnBatches(batches, validation_data, remarks)


def _calibrated(
    asked: Asked, target: PlanTarget, optimizer: BandMFOptimizer, count: int
) -> TrainingPlan:
    """Returns the plan of a run whose first `fit` this is."""
    epochs = target.epochs
    if epochs is not None and asked.epochs is not None:
        in_this_fit = checked_int("epochs", asked.epochs, 0) - asked.initial_epoch
        if in_this_fit > epochs:
            raise ValueError(
                "Expected `epochs` of `fit` to be at most those that the optimizer plans for all "
                f"calls of `fit`, {epochs}. Received: {in_this_fit} epochs. Leave `epochs` of the "
                "optimizer out, or plan more."
            )
    if epochs is None:
        last = asked.initial_epoch + _EPOCHS if asked.epochs is None else asked.epochs
        epochs = checked_int("epochs", last) - asked.initial_epoch
        if epochs < 1:
            raise ValueError(
                "Expected `epochs` to be above `initial_epoch`. Received: "
                f"epochs={asked.epochs}, initial_epoch={asked.initial_epoch}."
            )
    batch_size = _BATCH_SIZE if asked.batch_size is None else asked.batch_size
    batch_size = checked_int("batch_size", batch_size)
    if batch_size > count:
        default = " (the default of Keras)" if asked.batch_size is None else ""
        raise ValueError(
            f"Expected `batch_size` to be at most the number of rows, {count}. Received: "
            f"batch_size={batch_size}{default}. Use smaller batches."
        )
    whole, num_steps = count // batch_size, None
    if asked.steps_per_epoch is not None:
        steps = checked_int("steps_per_epoch", asked.steps_per_epoch)
        if steps > whole:
            raise ValueError(
                f"Expected `steps_per_epoch` to be at most {whole}, the rows over the batch size. "
                f"Received: steps_per_epoch={steps}."
            )
        num_steps = None if steps == whole else epochs * steps
    return target.plan_for(
        num_examples=count,
        batch_size=batch_size,
        epochs=epochs if num_steps is None else None,
        num_steps=num_steps,
        optimizer=optimizer.inner_optimizer,
        callback=None if asked.verbose == 0 else ProgressBar(),
    )


def _check_numbers(
    asked: Asked,
    optimizer: BandMFOptimizer,
    count: int,
    total: int,
    callbacks: Iterable[keras.callbacks.Callback],
) -> None:
    """Refuses rows, batch size or epochs that are not those of the plan."""
    plan, made = optimizer.plan, optimizer.plan_of_run.target is not None
    if plan.unit != ROW:
        raise ValueError(
            f"The plan counts units of the kind {plan.unit!r}, and rows alone do not say whose they"
            " are. Received: rows in `fit`. Pass `plan.batches(x, y, unit=ids)`."
        )
    if count != plan.num_examples:
        way_out = "Make the plan for the number of rows you have."
        if made:
            way_out = (
                "The plan was made by a first `fit`, of this optimizer or the one whose config or "
                "file it comes from: pass its rows again, or make a new optimizer with `epsilon` "
                "for a new run."
            )
        split = f", of which validation_split={asked.validation_split} leaves {count}"
        raise ValueError(
            f"Expected as many rows to train on as the plan has: num_examples={plan.num_examples}. "
            f"Received: {total} rows{split if count != total else ''}. {way_out}"
        )
    if asked.batch_size is not None and asked.batch_size != plan.batch_size:
        raise ValueError(
            f"`batch_size` must be the plan's {plan.batch_size}. Received: "
            f"batch_size={asked.batch_size}. Leave it out, or make a plan for it."
        )
    left = plan.num_steps - optimizer.steps_done
    # BackupAndRestore moves both the step and the first epoch when `fit` begins.
    restores = any(isinstance(each, keras.callbacks.BackupAndRestore) for each in callbacks)
    if asked.epochs is None or not left or restores:
        return
    per_epoch = asked.steps_per_epoch or plan.steps_per_epoch
    epochs = checked_int("epochs", asked.epochs, 0) - asked.initial_epoch
    fitting = math.ceil(left / per_epoch)
    if epochs > fitting:
        raise ValueError(
            f"Expected `epochs` to fit into the {left} steps that are left of the plan's "
            f"{plan.num_steps}: {fitting} epochs of {per_epoch} steps. Received: {epochs} epochs, "
            f"{epochs * per_epoch} steps. Use `epochs={asked.initial_epoch + fitting}`, leave it "
            "out, or plan more epochs from the start."
        )


def _check_shuffle(shuffle: bool | None) -> None:
    """Refuses an order that no plan gives: every sampling law draws the rows at random."""
    if shuffle is None or checked_bool("shuffle", shuffle, "Leave it out."):
        return
    raise ValueError(
        "The plan draws the rows of each batch at random, so that `shuffle` cannot be turned off. "
        "Received: shuffle=False. Leave it out. To train on rows in an order of your own, make a "
        "plan with sampling='fixed_order' that declares `max_participations` and `min_separation`."
    )


def _count(x: Any, y: Any, sample_weight: Any) -> int:
    """Returns the number of rows, the same in all arrays."""
    parts = {"x": x, "y": y, "sample_weight": sample_weight}
    counts = {
        name: [_length(leaf, name) for leaf in leaves(part)]
        for name, part in parts.items()
        if part is not None or name == "x"
    }
    if not counts["x"]:
        raise ValueError(f"Expected `x` to hold an array. Received: x={x!r}.")
    count = counts["x"][0]
    for name, found in counts.items():
        if any(each != count for each in found):
            raise ValueError(
                f"Expected `{name}` to have as many rows as `x`, one for each example. Received: "
                f"x of {count} rows, {name} of {', '.join(map(str, found))} rows."
            )
    if not count:
        raise ValueError("Expected rows to train on. Received: x of 0 rows.")
    return count


def _length(leaf: Any, name: str) -> int:
    """Returns the number of rows of an array."""
    shape = getattr(leaf, "shape", None)
    if shape is None or not len(shape) or shape[0] is None:
        raise ValueError(
            "A private `fit` takes arrays with one row for each example, a `tf.data.Dataset` of "
            "single examples, or what `plan.batches(x, y)` of the optimizer's plan returns, so "
            f"that sampler, noise and accounting come from one plan. Received: {name} of type "
            f"{type(leaf).__name__}. For data in a fixed order of your own, make the plan with "
            "sampling='fixed_order' and declare `max_participations` and `min_separation`."
        )
    return int(shape[0])


def _split(asked: Asked, total: int) -> tuple[int, tuple[Any, Any, Any], Any, list[str]]:
    """Returns the rows to train on and their number, validation data, and remarks on them."""
    rows = (asked.x, asked.y, asked.sample_weight)
    # As in Keras, `validation_data` overrides the split.
    if not asked.validation_split or asked.validation_data is not None:
        return total, rows, asked.validation_data, []
    share = checked_float("validation_split", asked.validation_split, minimum=0.0, below=1.0)
    count = math.floor(total * (1.0 - share))  # as in Keras
    if not 0 < count < total:
        raise ValueError(
            f"Expected `validation_split` to leave rows for training and for validation. Received: "
            f"validation_split={asked.validation_split} of {total} rows."
        )

    def part(where: slice) -> tuple[Any, Any, Any]:
        def cut(leaf: Any) -> Any:
            return None if leaf is None else leaf[where]

        return keras.tree.map_structure(cut, rows)

    remark = (
        f"validation_split={share} kept the last {total - count} of {total} {HELD_OUT} {count}, "
        "with the others given; metrics and callbacks of validation may tell anything about those"
    )
    validation = keras.utils.pack_x_y_sample_weight(*part(slice(count, total)))
    return count, part(slice(0, count)), validation, [remark]


def _examples_of(dataset: tf.data.Dataset, model: keras.Model, planned: bool) -> int:
    """Returns the number of examples of a dataset that is known not to be one of batches."""
    example = unpacked(dataset.element_spec, "the dataset")
    ranks = [leaf.shape.rank for leaf in leaves(example["x"])]
    expected = _input_ranks(model)
    if expected is not None and None not in ranks and sorted(ranks) == expected:
        raise ValueError(
            "Expected a dataset of single examples, of which the plan draws its own batches. "
            f"Received: a dataset of batches, {dataset.element_spec}. Use `dataset.unbatch()` with "
            "`tf.data.experimental.assert_cardinality`, or leave out `batch`."
        )
    count = int(dataset.cardinality())
    if count < 0:
        raise ValueError(
            "Expected a finite dataset that knows its number of examples, no `repeat()`. Received: "
            f"a dataset of {'infinite' if count == tf.data.INFINITE_CARDINALITY else 'unknown'} "
            "cardinality. Name it with "
            "`dataset.apply(tf.data.experimental.assert_cardinality(num_examples))`, or use "
            "`plan.batches(dataset)`. Batches are taken apart by `dataset.unbatch()`."
        )
    # No batch consists of scalars, such as the strings that a task takes.
    single = set(ranks) == {0} or (
        expected is not None
        and None not in ranks
        and sorted(rank + 1 for rank in ranks) == expected
    )
    if not planned and not single:
        raise ValueError(
            "Expected a dataset that is known to yield single examples, because its length becomes "
            f"the plan's number of examples. Received: elements {dataset.element_spec}, and a "
            f"model whose inputs have {expected or 'unknown'} dimensions with that of the batch. "
            "Pass arrays, or make the plan with `TrainingPlan.calibrate(num_examples=...)` and use "
            "`plan.batches(dataset)`. Batches are taken apart by `dataset.unbatch()`."
        )
    return count


def _input_ranks(model: keras.Model) -> list[int] | None:
    """Returns the numbers of dimensions of the inputs of a model in order; None if unknown."""
    try:
        inputs = keras.tree.flatten(model.inputs)
    except (AttributeError, ValueError):  # subclassed, or a Sequential that is not built
        return None
    return sorted(len(each.shape) for each in inputs) or None
