"""Inputs of a TFX Trainer: the plan in `custom_config`, and TFXIO's stream as data of that plan.

Nothing of TFX is imported: a stream is the `tf.data.Dataset` that
`fn_args.data_accessor.tf_dataset_factory` returns. In `run_fn`:

```python
plan = tfx_input.plan_from_config(fn_args.custom_config)
options = TensorFlowDatasetOptions(**tfx_input.stream_options(plan, label_key="label"))
stream = fn_args.data_accessor.tf_dataset_factory(fn_args.train_files, options, schema)
model.fit(tfx_input.private_batches(stream, plan), epochs=10)
```

`import tensorflow_transform` makes `tf.keras` Keras 2: models and layers are to come from
`import keras`, which stays Keras 3.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import tensorflow as tf

from keras_bandmf.planning.plan import TrainingPlan
from keras_bandmf.sampling import PrivateBatches, StreamedBatches

__all__ = [
    "PLAN_KEY",
    "plan_from_config",
    "plan_to_config",
    "private_batches",
    "stream_options",
    "streamed_batches",
]

PLAN_KEY = "keras_bandmf_plan"


def plan_to_config(plan: TrainingPlan) -> dict[str, str]:
    """The entry of `Trainer(custom_config=...)` that carries a plan.

    Args:
        plan: the plan of the run.

    Returns:
        `PLAN_KEY` to the plan's JSON, exact to the last bit; no key or seed is in it.
    """
    return {PLAN_KEY: plan.to_json()}


def plan_from_config(custom_config: Mapping[str, Any] | None) -> TrainingPlan:
    """The plan that `plan_to_config` put into `custom_config`.

    Args:
        custom_config: that of the Trainer's `fn_args`.

    Returns:
        The plan, with the fingerprint of the original.

    Raises:
        TypeError: if `custom_config` is no dict.
        ValueError: if it holds no plan, or one of another version of this library.
    """
    if not isinstance(custom_config, Mapping):
        raise TypeError(
            "Argument `custom_config` must be the dict given to the Trainer. Received: "
            f"custom_config={custom_config!r}. Use "
            "`Trainer(custom_config=tfx_input.plan_to_config(plan))`."
        )
    if PLAN_KEY not in custom_config:
        raise ValueError(
            f"Expected a plan in `custom_config[{PLAN_KEY!r}]`. Received: custom_config with the "
            f"keys {sorted(map(str, custom_config))}. Use "
            "`Trainer(custom_config={**tfx_input.plan_to_config(plan), ...})`."
        )
    try:
        return TrainingPlan.from_json(custom_config[PLAN_KEY])
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"`custom_config[{PLAN_KEY!r}]` holds no plan that this release can read: {error} "
            "Pipeline and Trainer need the same release of keras_bandmf; make the plan anew with "
            "`tfx_input.plan_to_config`."
        ) from error


def stream_options(plan: TrainingPlan, label_key: str | None = None) -> dict[str, Any]:
    """Arguments of TFXIO's `TensorFlowDatasetOptions` under which a plan can account for a stream.

    TFXIO's own defaults shuffle within a buffer, repeat for ever and read in parallel.

    Args:
        plan: the plan of the run.
        label_key: the feature that becomes the target.

    Returns:
        Keyword arguments: one pass in the order of the files, nothing dropped.
    """
    return {
        "batch_size": plan.batch_size,
        "drop_final_batch": False,
        "num_epochs": 1,
        "shuffle": False,
        "reader_num_threads": 1,
        "parser_num_threads": 1,
        "sloppy_ordering": False,
        "label_key": label_key,
    }


def private_batches(
    stream: tf.data.Dataset,
    plan: TrainingPlan,
    *,
    class_weight: dict[int, float] | None = None,
    preprocess: Any = None,
    seed: int | None = None,
) -> PrivateBatches:
    """`plan.batches` of a stream of batches, which is read once into memory.

    Formal guarantees:
        As of `plan.batches`, cyclic Poisson sampling included: TFXIO decides only which number a
        row has, not who takes part when. A stream that does not hold exactly the plan's
        `num_examples` is refused.

    Args:
        stream: one pass over the data, in batches of any size: `x`, `(x, y)` or
            `(x, y, sample_weight)`, x often a dict of features.
        plan: the plan of the run.
        class_weight: as of `plan.batches`.
        preprocess: as of `plan.batches`; for example from a dict of features to one array.
        seed: for tests only: the run is then not private.

    Returns:
        What the private `fit` takes.

    Raises:
        TypeError: if `stream` is no dataset of dense tensors.
        ValueError: if it is endless or holds another number of rows.
    """
    _refuse_other_streams(stream)
    return plan.batches(
        stream.unbatch(), class_weight=class_weight, preprocess=preprocess, seed=seed
    )


def streamed_batches(stream: tf.data.Dataset, plan: TrainingPlan) -> StreamedBatches:
    """Batches of a fixed-order plan in the order of a stream that does not fit into memory.

    Formal guarantees:
        See `StreamedBatches`: the order is compared with that of the first reading, batch by
        batch, so that the separation of the plan is enforced, not taken on trust.

    Args:
        stream: one pass over the data in batches of `plan.batch_size`, with the `stream_options`
            of the plan.
        plan: a plan with `sampling="fixed_order"`.

    Returns:
        What the private `fit` takes.

    Raises:
        TypeError: if `stream` is no dataset of dense tensors.
        ValueError: if the plan is another, or the stream is endless, shuffled, cut short, or does
            not hold the plan's `num_examples`.
    """
    _refuse_other_streams(stream)
    if plan.sampling != "fixed_order" or plan.declares_participations:
        raise ValueError(
            "A stream that is not read into memory needs a plan with sampling='fixed_order' that "
            "declares no participations: they follow from the stream. Received: "
            f"sampling={plan.sampling!r}, max_participations={plan.max_participations}. For "
            "Poisson sampling use `private_batches`."
        )
    return StreamedBatches(stream, schedule=plan.schedule, plan_fingerprint=plan.fingerprint)


def _refuse_other_streams(stream: Any) -> None:
    """Says in the words of TFXIO what a stream must be."""
    if not isinstance(stream, tf.data.Dataset):
        raise TypeError(
            "Argument `stream` must be the tf.data.Dataset that "
            "`fn_args.data_accessor.tf_dataset_factory(files, options, schema)` returns. "
            f"Received: stream of type {type(stream).__name__}"
        )
    if int(stream.cardinality()) == tf.data.INFINITE_CARDINALITY:
        raise ValueError(
            "Argument `stream` must end after one pass over the data. Received: an endless stream "
            "(TFXIO's default is num_epochs=None). Make it with "
            "`TensorFlowDatasetOptions(**tfx_input.stream_options(plan, label_key))`."
        )


def __dir__() -> list[str]:
    return __all__
