"""Replicas, and what the worker processes of one job tell each other."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import tensorflow as tf


def replica_id() -> int:
    """Returns the number of the replica in whose context it is called, known while tracing.

    Raises:
        ValueError: outside a replica context, or where the number is not known.
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


def is_multi_worker(strategy: tf.distribute.Strategy) -> bool:
    """Returns whether the strategy trains in several processes."""
    return (
        isinstance(strategy, tf.distribute.MultiWorkerMirroredStrategy)
        and strategy.extended._in_multi_worker_mode()
    )


def local_replicas(strategy: tf.distribute.Strategy) -> list[int]:
    """Returns the replicas of this process."""
    if not is_multi_worker(strategy):
        return list(range(strategy.num_replicas_in_sync))
    replicas = _distributed(strategy, lambda replica: replica)
    return [int(replica) for replica in strategy.experimental_local_results(replicas)]


def from_chief(strategy: tf.distribute.Strategy, value: np.ndarray) -> np.ndarray:
    """Returns the value of the first replica's process, in every process.

    All processes of a job must call it, in the same order as the other functions of this file;
    one that does not lets the others wait or fail.

    Args:
        strategy: the strategy of the job.
        value: int64, of the same shape in every process.
    """
    if not is_multi_worker(strategy):
        return value
    parts = _distributed(strategy, lambda r: tf.constant(value if r == 0 else np.zeros_like(value)))
    return strategy.reduce("SUM", parts, axis=None).numpy()


def same_everywhere(strategy: tf.distribute.Strategy, content: bytes) -> bool:
    """Returns, in every process, whether all of them passed the same bytes."""
    if not is_multi_worker(strategy):
        return True
    words = np.frombuffer(hashlib.sha256(content).digest(), np.int64)
    differs = int(not np.array_equal(words, from_chief(strategy, words)))
    return int(strategy.reduce("SUM", _distributed(strategy, lambda r: differs), axis=None)) == 0


def gather_parts(strategy: tf.distribute.Strategy, parts: Sequence[np.ndarray]) -> list[np.ndarray]:
    """Returns the parts of all replicas in their order, in every process.

    Args:
        strategy: the strategy of the job.
        parts: of each replica of this process, all of one shape.
    """
    if not is_multi_worker(strategy):
        return list(parts)
    first = local_replicas(strategy)[0]
    replicas = strategy.gather(_distributed(strategy, lambda r: tf.constant([r])), axis=0).numpy()
    values = strategy.gather(_distributed(strategy, lambda r: parts[r - first][None]), axis=0)
    return list(values.numpy()[np.argsort(replicas)])


def _distributed(strategy: tf.distribute.Strategy, value_of: Callable[[int], Any]) -> Any:
    def value(context: tf.distribute.experimental.ValueContext) -> tf.Tensor:
        return tf.convert_to_tensor(value_of(context.replica_id_in_sync_group))

    return strategy.experimental_distribute_values_from_function(value)
