"""Replicas, and what the worker processes of a job tell each other."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import tensorflow as tf

from keras_bandmf._keras_internals import in_multi_worker_mode


def replica_id() -> int:
    """Returns the number of the current replica, which is known while a step is traced.

    Raises:
        ValueError: If it is called outside a replica context, or the number is not known.
    """
    context = tf.distribute.get_replica_context()
    if context is None:
        raise ValueError(
            "`apply_clipped` must be called in a replica context, inside `strategy.run`."
        )
    replica = tf.get_static_value(context.replica_id_in_sync_group)
    if replica is None:
        raise ValueError(
            "The replica id must be known when the step is traced. Received: "
            f"{type(context.strategy).__name__}, which does not provide it. Use MirroredStrategy."
        )
    return int(replica)


def is_multi_worker(distribution: tf.distribute.Strategy) -> bool:
    """Returns whether the distribution trains in several processes."""
    return isinstance(
        distribution, tf.distribute.MultiWorkerMirroredStrategy
    ) and in_multi_worker_mode(distribution)


def local_replicas(distribution: tf.distribute.Strategy) -> list[int]:
    """Returns the numbers of the replicas of this process."""
    if not is_multi_worker(distribution):
        return list(range(distribution.num_replicas_in_sync))
    replicas = _distributed(distribution, lambda replica: replica)
    return [int(replica) for replica in distribution.experimental_local_results(replicas)]


def own_variable(value: Any, name: str) -> tf.Variable:
    """Makes a variable of which each replica has, and updates, its own copy.

    Args:
        value: The initial value, a tensor.
        name: The name.
    """
    return tf.Variable(
        value,
        trainable=False,
        synchronization=tf.VariableSynchronization.ON_READ,
        aggregation=tf.VariableAggregation.NONE,
        name=name,
    )


def from_chief(distribution: tf.distribute.Strategy, value: np.ndarray) -> np.ndarray:
    """Returns, in every process, the value that the process of the first replica passed.

    All processes of a job must call it, in the same order as the other functions of this file. If
    one does not, the others wait or fail.

    Args:
        distribution: The distribution of the job.
        value: An int64 array, of the same shape in every process.

    Returns:
        An int64 array of that shape.
    """
    if not is_multi_worker(distribution):
        return value
    parts = _distributed(
        distribution, lambda r: tf.constant(value if r == 0 else np.zeros_like(value))
    )
    return distribution.reduce("SUM", parts, axis=None).numpy()


def same_everywhere(distribution: tf.distribute.Strategy, content: bytes) -> bool:
    """Returns, in every process, whether all of them passed the same bytes."""
    if not is_multi_worker(distribution):
        return True
    words = np.frombuffer(hashlib.sha256(content).digest(), np.int64)
    differs = int(not np.array_equal(words, from_chief(distribution, words)))
    found = _distributed(distribution, lambda r: differs)
    return int(distribution.reduce("SUM", found, axis=None)) == 0


def gather_parts(
    distribution: tf.distribute.Strategy, parts: Sequence[np.ndarray]
) -> list[np.ndarray]:
    """Returns, in every process, the parts of all replicas in the order of the replicas.

    Args:
        distribution: The distribution of the job.
        parts: One array for each replica of this process, all of the same shape.
    """
    if not is_multi_worker(distribution):
        return list(parts)
    first = local_replicas(distribution)[0]
    numbers = _distributed(distribution, lambda r: tf.constant([r]))
    replicas = distribution.gather(numbers, axis=0).numpy()
    values = _distributed(distribution, lambda r: parts[r - first][None])
    return list(distribution.gather(values, axis=0).numpy()[np.argsort(replicas)])


def _distributed(distribution: tf.distribute.Strategy, value_of: Callable[[int], Any]) -> Any:
    def value(context: tf.distribute.experimental.ValueContext) -> tf.Tensor:
        return tf.convert_to_tensor(value_of(context.replica_id_in_sync_group))

    return distribution.experimental_distribute_values_from_function(value)
