"""Batches in the order of a stream that is too large for memory: read and checked in each epoch."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from typing import Any

import numpy as np
import tensorflow as tf

from keras_bandmf._checks import checked_int
from keras_bandmf.sampling.batch_arguments import checked_schedule
from keras_bandmf.sampling.batches import PrivateBatches
from keras_bandmf.sampling.schedule import Schedule
from keras_bandmf.sampling.sources import leaves, refuse_composites, unpacked
from keras_bandmf.sampling.stores import MemoryStore

_PROBED_BATCHES = 8


class StreamedBatches(PrivateBatches):
    """The batches of a fixed-order plan, read from a `tf.data.Dataset` anew in each epoch.

    `tfx_input.streamed_batches(stream, plan)` makes it. The stream is read once when the object is
    made, and once more in each epoch of training. Memory holds a few batches, and 32 bytes for
    each batch of an epoch.

    Formal guarantees:
        * Batch t is batch `t mod steps_per_epoch` of the first reading, bit for bit: every batch
          is compared with its hash, and another one ends training before its step. Two
          participations of a row are therefore a multiple of `steps_per_epoch` steps apart, as
          the accounting assumes; the rows of an incomplete last batch never take part.
        * It assumes that each row of the data stands in the stream once, and that what was done
          to a row there does not depend on the others.

    Args:
        stream: A dataset of batches `x`, `(x, y)` or `(x, y, sample_weight)` of `batch_size` rows,
            with the remaining rows at the end; in the same order whenever it is read.
        schedule: The schedule of the plan, which its epsilon is computed from, too: a fixed order
            without declared participations. The stream must hold exactly `schedule.num_examples`
            rows.
        plan_fingerprint: The fingerprint of the plan, by which `fit` recognizes its own batches.

    Raises:
        TypeError: The stream is not a `tf.data.Dataset` of dense tensors.
        ValueError: The stream is endless, shuffled or cut short, or its batches are not those of
            the plan.

    Example:
        >>> import keras_bandmf as bandmf
        >>> import numpy as np
        >>> import tensorflow as tf
        >>> plan = bandmf.TrainingPlan(
        ...     num_examples=25, batch_size=10, num_steps=4, num_bands=2,
        ...     noise_multiplier=1.0, delta=1e-5, sampling="fixed_order",
        ... )
        >>> stream = tf.data.Dataset.from_tensor_slices(np.arange(25)).batch(10)
        >>> batches = bandmf.tfx_input.streamed_batches(stream, plan)
        >>> [batches.indices(t)[0].item() for t in range(4)]
        [0, 10, 0, 10]
    """

    # Does not call that of the base, which reads all rows into memory.
    def __init__(
        self,
        stream: tf.data.Dataset,
        *,
        schedule: Schedule,
        plan_fingerprint: str,
    ):
        checked_schedule(schedule)
        if schedule.sampling != "fixed_order" or schedule.min_separation is not None:
            raise ValueError(
                "Expected `schedule` to be in a fixed order and to declare no participations: they "
                f"follow from the stream. Received: schedule={schedule!r}. For Poisson sampling "
                "read the data into memory with `plan.batches`."
            )
        if not isinstance(stream, tf.data.Dataset):
            raise TypeError(
                "Expected `stream` to be a tf.data.Dataset of batches. Received: stream of type "
                f"{type(stream).__name__}."
            )
        refuse_composites(stream.element_spec, "the stream")
        if int(stream.cardinality()) == tf.data.INFINITE_CARDINALITY:
            raise ValueError(
                "Expected `stream` to end after one pass over the data. Received: infinite "
                "cardinality. Use no `.repeat()`; with TFXIO, use num_epochs=1."
            )
        options = tf.data.Options()
        options.deterministic = True
        self._stream = stream.with_options(options)
        first, self._digests = self._read(schedule)
        first.spec()  # refuses strings
        self._begin(schedule, first, plan_fingerprint, None)
        self._probe()

    def raw_spec(self) -> None:
        """Returns None: what a stream yields is never preprocessed here."""

    def _read(self, schedule: Schedule) -> tuple[MemoryStore, list[bytes]]:
        """Returns the first batch, and the digests of all full ones."""
        first: MemoryStore | None = None
        digests: list[bytes] = []
        found = 0
        for batch in self._batches_from(0):
            if batch.num_examples > schedule.batch_size or found % schedule.batch_size:
                raise ValueError(
                    f"Expected `stream` to yield batches of batch_size={schedule.batch_size} rows, "
                    "and fewer only at its end. Received: "
                    f"{batch.num_examples} rows after {found}."
                )
            found += batch.num_examples
            if found > schedule.num_examples:
                break
            first = first or batch
            if batch.num_examples == schedule.batch_size:
                digests.append(batch.digest(b""))
        if first is None or found != schedule.num_examples:
            raise ValueError(
                f"Expected `stream` to yield num_examples={schedule.num_examples} rows. Received: "
                f"{'more' if found > schedule.num_examples else found}. num_examples is a public "
                "constant of the plan: make the plan for the rows there are, and cut nothing off "
                "(no `.take`; with TFXIO, drop_final_batch=False: the incomplete batch is left out "
                "here)."
            )
        return first, digests

    def _probe(self) -> None:
        """Reads the first batches again, to find out whether the stream is shuffled."""
        again = self._batches_from(0)
        for position, expected in enumerate(self._digests[:_PROBED_BATCHES]):
            batch = next(again, None)
            if batch is None or batch.digest(b"") != expected:
                raise ValueError(
                    "Expected `stream` to be the same whenever it is read. Received: a different "
                    f"batch {position} on the second reading. Use no `.shuffle()`, no random "
                    "augmentation and one reader; with TFXIO, use shuffle=False, "
                    "reader_num_threads=1 and sloppy_ordering=False, as "
                    "`tfx_input.stream_options` returns them."
                )

    def _batches_from(self, position: int) -> Iterator[MemoryStore]:
        """Yields the batches of one pass, from a position on."""
        for element in self._stream.skip(position):
            columns = unpacked(element, "the stream")
            shape = leaves(columns)[0].shape
            rows = shape[0] if shape.rank else 0
            x, y, weight = (columns.get(name) for name in ("x", "y", "sample_weight"))
            yield MemoryStore.read(x, y, weight, rows)

    def _from_cursor(self, num_replicas: int, few_sizes: bool) -> Iterator[dict[str, Any]]:
        step = self.cursor
        while step < self.num_steps:
            position = step % self.steps_per_epoch
            batches = self._batches_from(position)
            for expected in self._digests[position : position + self.num_steps - step]:
                batch = next(batches, None)
                if batch is None or batch.digest(b"") != expected:
                    raise ValueError(
                        f"Expected the stream to deliver in step {step} the batch that it "
                        "delivered at first: otherwise a row could take part sooner again, or more "
                        "often, than the plan accounts for. Received: another batch. Is the stream "
                        "shuffled, or did its files change?"
                    )
                yield self._padded_batch(batch, step, num_replicas)
                step += 1

    def _padded_batch(self, batch: MemoryStore, t: int, num_replicas: int) -> dict[str, Any]:
        self._bound_draws()
        return self._arranged(batch, np.arange(self.batch_size), t, num_replicas)

    def indices(self, t: int) -> np.ndarray:
        """Returns the positions in the stream of the rows of step t.

        Args:
            t: The step, 0 <= t < num_steps.

        Returns:
            (batch_size,) int64.

        Raises:
            ValueError: t is not a step of the plan.
        """
        start = (self._checked_step(t) % self.steps_per_epoch) * self.batch_size
        return np.arange(start, start + self.batch_size)

    def batch(self, t: int, num_replicas: int = 1, few_sizes: bool = True) -> dict[str, Any]:
        """Returns the padded batch of step t, and reads the stream up to it.

        Args:
            t: The step, 0 <= t < num_steps.
            num_replicas: Number of replicas that share it.
            few_sizes: Of no effect: in a fixed order all batches have one size.

        Returns:
            The same as `PrivateBatches.batch`.

        Raises:
            RuntimeError: No key is bound.
            ValueError: t is not a step of the plan.
        """
        position = self._checked_step(t) % self.steps_per_epoch
        batch = next(self._batches_from(position))
        return self._padded_batch(batch, t, checked_int("num_replicas", num_replicas))

    def digest(self) -> bytes:
        """Returns 32 bytes that depend on the sampler's key, the rows and their order.

        Returns:
            The digest; see `PrivateBatches.digest`.

        Raises:
            RuntimeError: No key is bound.
        """
        rows = b"".join(self._digests)
        return hashlib.blake2b(rows, key=self._bound_key().tobytes(), digest_size=32).digest()
