"""Which replica is computing."""

from __future__ import annotations

import tensorflow as tf


def replica_id() -> int:
    """Returns the replica in whose context this is called, a Python integer.

    Raises:
        ValueError: outside a replica context, or under a strategy that does not tell.
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
