"""Inputs of a TFX Trainer: the plan in `custom_config`, and TFXIO's stream as data of that plan.

TFX itself is not imported: a stream is the `tf.data.Dataset` that
`fn_args.data_accessor.tf_dataset_factory` returns. In `run_fn`:

```python
plan = tfx_input.plan_from_config(fn_args.custom_config)
options = TensorFlowDatasetOptions(**tfx_input.stream_options(plan, label_key="label"))
stream = fn_args.data_accessor.tf_dataset_factory(fn_args.train_files, options, schema)
model.fit(tfx_input.private_batches(stream, plan), epochs=10)
```

`import tensorflow_transform` turns `tf.keras` into Keras 2. Take models and layers from
`import keras`, which remains Keras 3.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import tensorflow as tf

from keras_bandmf.planning.plan import TrainingPlan
from keras_bandmf.planning.units import check_unit_ids
from keras_bandmf.sampling import PrivateBatches, StreamedBatches
from keras_bandmf.sampling.sources import refuse_composites, unpacked

__all__ = [
    "PLAN_KEY",
    "plan_from_config",
    "plan_to_config",
    "private_batches",
    "stream_options",
    "streamed_batches",
]

#: The key of the plan in `custom_config`.
PLAN_KEY = "keras_bandmf_plan"


def plan_to_config(plan: TrainingPlan) -> dict[str, str]:
    """Returns the entry of `Trainer(custom_config=...)` that carries a plan.

    Args:
        plan: The plan of the run.

    Returns:
        A dict from `PLAN_KEY` to the plan's JSON, which is exact to the last bit. It contains no
        key and no seed.

    Example:
        >>> import keras_bandmf as bandmf
        >>> plan = bandmf.TrainingPlan(
        ...     num_examples=100, batch_size=10, epochs=1, noise_multiplier=1.0, delta=1e-5,
        ...     num_bands=1)
        >>> custom_config = {"epochs": 1, **bandmf.tfx_input.plan_to_config(plan)}
        >>> sorted(custom_config)
        ['epochs', 'keras_bandmf_plan']
    """
    return {PLAN_KEY: plan.to_json()}


def plan_from_config(custom_config: Mapping[str, Any] | None) -> TrainingPlan:
    """Returns the plan that `plan_to_config` put into `custom_config`.

    Args:
        custom_config: The `custom_config` of the Trainer's `fn_args`.

    Returns:
        The plan, with the fingerprint of the original.

    Raises:
        TypeError: If `custom_config` is not a dict.
        ValueError: If it contains no plan, or one of another version of this library.

    Example:
        >>> import keras_bandmf as bandmf
        >>> plan = bandmf.TrainingPlan(
        ...     num_examples=100, batch_size=10, epochs=1, noise_multiplier=1.0, delta=1e-5,
        ...     num_bands=1)
        >>> custom_config = bandmf.tfx_input.plan_to_config(plan)
        >>> bandmf.tfx_input.plan_from_config(custom_config).fingerprint == plan.fingerprint
        True
    """
    if not isinstance(custom_config, Mapping):
        raise TypeError(
            "Expected `custom_config` to be the dict given to the Trainer. Received: "
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
            "Pipeline and Trainer need the same release of keras_bandmf. Make a new plan and pass "
            "it with `tfx_input.plan_to_config`."
        ) from error


def stream_options(plan: TrainingPlan, label_key: str | None = None) -> dict[str, Any]:
    """Returns the TFXIO options under which a plan can account for a stream.

    TFXIO's own defaults shuffle within a buffer, repeat forever and read in parallel.

    Args:
        plan: The plan of the run.
        label_key: The feature that becomes the target.

    Returns:
        Keyword arguments of `TensorFlowDatasetOptions`: one pass in the order of the files, and
        nothing is dropped.

    Example:
        >>> import keras_bandmf as bandmf
        >>> plan = bandmf.TrainingPlan(
        ...     num_examples=100, batch_size=10, epochs=1, noise_multiplier=1.0, delta=1e-5,
        ...     num_bands=1)
        >>> options = bandmf.tfx_input.stream_options(plan, label_key="label")
        >>> options["batch_size"], options["num_epochs"], options["shuffle"]
        (10, 1, False)
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
    preprocess: Callable[..., Any] | None = None,
    seed: int | None = None,
    unit_key: str | None = None,
    rows_per_unit: int = 1,
    augment: Callable[..., Any] | None = None,
    augment_copies: int = 1,
) -> PrivateBatches:
    """Returns `plan.batches` of a stream of batches, which is read once into memory.

    Formal guarantees:
        Those of `plan.batches`, cyclic Poisson sampling included: TFXIO decides only which number a
        row has, not who takes part when. A stream that does not hold exactly the plan's
        `num_examples` is refused.

    Args:
        stream: One pass over the data, in batches of any size: `x`, `(x, y)` or
            `(x, y, sample_weight)`. Often x is a dict of features.
        plan: The plan of the run.
        class_weight: See `plan.batches`.
        preprocess: See `plan.batches`. It may, for example, turn a dict of features into an array.
        seed: For tests only: the run is then not private.
        unit_key: For a plan with a `unit`: the feature of x that holds whose row it is. It is taken
            out of x; see the argument `unit` of `plan.batches`.
        rows_per_unit: See `plan.batches`.
        augment: See `plan.batches`.
        augment_copies: See `plan.batches`.

    Returns:
        The batches, which the private `fit` takes.

    Raises:
        TypeError: If `stream` is not a dataset of dense tensors.
        ValueError: If it is endless, has another number of rows, or has no feature `unit_key`.

    Example:
        >>> import numpy as np
        >>> import tensorflow as tf
        >>> import keras_bandmf as bandmf
        >>> plan = bandmf.TrainingPlan(
        ...     num_examples=100, batch_size=10, epochs=1, noise_multiplier=1.0, delta=1e-5,
        ...     num_bands=1)
        >>> rows = {"a": np.zeros((100, 3))}, np.zeros(100)
        >>> stream = tf.data.Dataset.from_tensor_slices(rows).batch(32)
        >>> batches = bandmf.tfx_input.private_batches(
        ...     stream, plan, preprocess=lambda features, label: (features["a"], label))
        >>> batches.steps_per_epoch
        10
    """
    _refuse_other_streams(stream)
    options: dict[str, Any] = {
        "class_weight": class_weight,
        "preprocess": preprocess,
        "seed": seed,
        "rows_per_unit": rows_per_unit,
        "augment": augment,
        "augment_copies": augment_copies,
    }
    check_unit_ids(plan.unit, unit_key)
    if unit_key is None:
        return plan.batches(stream.unbatch(), **options)
    columns, ids = _with_ids(stream, unit_key)
    return plan.batches(**columns, unit=ids, **options)


def _with_ids(stream: tf.data.Dataset, unit_key: str) -> tuple[dict[str, Any], np.ndarray]:
    """Reads a stream, and returns its columns and the ids that one feature of x holds.

    Both come from one reading: a second one might have another order.
    """
    refuse_composites(stream.element_spec, "the stream")
    batches = [unpacked(batch, "the stream") for batch in stream]
    columns = tf.nest.map_structure(lambda *parts: np.concatenate(parts), *batches)
    features = columns["x"]
    if not isinstance(features, dict) or unit_key not in features:
        received = sorted(features) if isinstance(features, dict) else type(features).__name__
        raise ValueError(
            "Expected `unit_key` to name a feature of x, which holds whose row it is. Received: "
            f"unit_key={unit_key!r} and x with {received}."
        )
    ids = features.pop(unit_key)
    return columns, ids.reshape(-1) if ids.ndim == 2 and ids.shape[1] == 1 else ids


def streamed_batches(stream: tf.data.Dataset, plan: TrainingPlan) -> StreamedBatches:
    """Returns batches of a fixed-order plan, in the order of a stream too large for memory.

    Formal guarantees:
        See `StreamedBatches`: the order is compared with that of the first reading, batch by
        batch, so that the separation of the plan is enforced, not taken on trust.

    Args:
        stream: One pass over the data in batches of `plan.batch_size`, with the `stream_options`
            of the plan.
        plan: A plan with `sampling="fixed_order"`.

    Returns:
        The batches, which the private `fit` takes.

    Raises:
        TypeError: If `stream` is not a dataset of dense tensors.
        ValueError: If the plan is of another kind or counts units other than rows, or the stream is
            endless, shuffled, cut short, or does not have the plan's `num_examples`.

    Example:
        >>> import numpy as np
        >>> import tensorflow as tf
        >>> import keras_bandmf as bandmf
        >>> plan = bandmf.TrainingPlan(
        ...     num_examples=100, batch_size=10, epochs=2, noise_multiplier=5.0, delta=1e-5,
        ...     num_bands=4, sampling="fixed_order")
        >>> rows = np.zeros((100, 3), np.float32), np.zeros(100, np.float32)
        >>> stream = tf.data.Dataset.from_tensor_slices(rows).batch(plan.batch_size)
        >>> batches = bandmf.tfx_input.streamed_batches(stream, plan)
        >>> batches.steps_per_epoch
        10
    """
    _refuse_other_streams(stream)
    if plan.sampling != "fixed_order" or plan.declares_participations:
        raise ValueError(
            "A stream that is not read into memory needs a plan with sampling='fixed_order' that "
            "declares no participations, because they follow from the stream. Received: "
            f"sampling={plan.sampling!r}, max_participations={plan.max_participations}. For "
            "Poisson sampling use `private_batches`."
        )
    check_unit_ids(plan.unit, None)
    return StreamedBatches(stream, schedule=plan.schedule, plan_fingerprint=plan.fingerprint)


def _refuse_other_streams(stream: Any) -> None:
    """Refuses other streams, in the words of TFXIO."""
    if not isinstance(stream, tf.data.Dataset):
        raise TypeError(
            "Expected `stream` to be the tf.data.Dataset that "
            "`fn_args.data_accessor.tf_dataset_factory(files, options, schema)` returns. "
            f"Received: stream of type {type(stream).__name__}"
        )
    if int(stream.cardinality()) == tf.data.INFINITE_CARDINALITY:
        raise ValueError(
            "Expected `stream` to end after one pass over the data. Received: an endless stream "
            "(TFXIO's default is num_epochs=None). Make it with "
            "`TensorFlowDatasetOptions(**tfx_input.stream_options(plan, label_key))`."
        )


def __dir__() -> list[str]:
    return __all__
