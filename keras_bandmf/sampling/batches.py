"""The batches of a plan: padded, masked, and a function of the plan, the key and the step."""

from __future__ import annotations

import atexit
import contextlib
import gc
import hashlib
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import tensorflow as tf

from keras_bandmf._checks import checked_int
from keras_bandmf.sampling.augmentation import Augmentation
from keras_bandmf.sampling.batch_arguments import (
    WHERE_TO_PASS,
    checked_key,
    checked_schedule,
    key_from_seed,
    missing_attribute,
    refuse_alone,
    refuse_rows_that_count_as_one,
)
from keras_bandmf.sampling.draws import UNIT_ROWS, VIEWS, arrangement, bit_stream, round_up
from keras_bandmf.sampling.laws import Draws, SamplingName
from keras_bandmf.sampling.schedule import Schedule
from keras_bandmf.sampling.stores import Store, open_store
from keras_bandmf.sampling.units import Units


class PrivateBatches:
    """The data of a private run, sampled as its plan says: what `plan.batches(x, y)` returns.

    Pass it to `fit` of a privatized model as it is. It is not a `tf.data.Dataset`, because a
    transformation of its batches would change who takes part when, and the privacy statement
    would no longer hold.

    Formal guarantees:
        * `batch(t)` depends on the plan, the key and t alone: not on what was drawn before, on
          the number of iterators, or on prefetching.
        * Every example that step t draws is in `batch(t)` exactly once where `mask` is true:
          nothing is cut. Rows where it is false are padding: copies of rows of the data, chosen
          at random. Drawn rows and padding stand in an order that the key and t decide, and
          each replica's part has at least one row of padding.
        * The number of rows of a batch tells how many examples were drawn, up to rounding (with
          `few_sizes`: in which of a few ranges that lies). It is as secret as the mask. Nothing
          that is released depends on it: padding adds exact zeros, the sum is divided by the
          expected size, and what places and padding do to the rounding of sums is charged
          (`noise.lattice.charged_norm`). Who can time the steps of a run may learn it.
        * With `unit`, what is drawn are units. Each stands in a batch at most once, as
          `rows_per_example` consecutive rows, all of them its own: those that take part, and the
          same again as padding. With `augment`, each of them is `augment_copies` views. The
          consecutive rows are one example to `clipped_gradients`: together they count once.
        * The key is bound once. A second key would regroup the examples, and an example could
          then take part in adjacent steps, where the sensitivity does not cover it.
        * It assumes that the rows of `x` stand in the same order in every process that continues
          the run (an example is its row number), and that `preprocess` and `decode` treat each row
          by itself, always in the same way. `digest` compares the rows with those the run began
          with: every byte of what is in memory, and 1,024 secret positions of what is read from
          disk or a source (`stores.random_access.RandomAccessStore` says what that can miss).

    Args:
        x: NumPy array, tensor, or nested dict, tuple or list of them, one row an example; or a
            `tf.data.Dataset` of single examples `x`, `(x, y)` or `(x, y, sample_weight)` in a
            repeatable order, which is read once into memory. Read row by row, when a step draws
            them: memory-mapped files of 256 MiB or more, arrays of HDF5 and Zarr; and, as `x`
            alone, a source: any object with `__len__` and `__getitem__(int)` (and perhaps
            `__getitems__(list)`) that returns single rows, as those of Hugging Face, Grain and
            ArrayRecord. A list in such a row is an array.
        y: Targets, as `x`; None when there are none (or when `x` brings them).
        sample_weight: Non-negative weights, one a row; a structure for several outputs.
        schedule: The schedule of the plan, which its epsilon is computed from, too. `x` must hold
            exactly `schedule.num_examples` rows.
        plan_fingerprint: The fingerprint of the plan, by which `fit` recognizes its own batches.
        unit: (rows,) ids, for a plan that counts units such as persons: whose row it is. The
            schedule's examples are then the different ids, in sorted order. Ids stand in the order
            of the rows of `x`, which nobody can check. See `Units`.
        rows_per_unit: The largest number of rows of a unit in a step, chosen anew in each.
        augment: A random function of one row, or a Keras layer. See `Augmentation`.
        augment_copies: The number of views of each row, which count as one example together.
        class_weight: Dict of class number to weight, multiplied into `sample_weight`.
        preprocess: Called on tensors of up to 1024 rows, as `preprocess(x)` or
            `preprocess(x, y)`, before augmentation: once where the data is in memory, and else on
            each row that a batch reads, one at a time. Returns what Keras takes: `x`,
            `(x, y)` or `(x, y, sample_weight)`, with the same number of rows.
        seed: Fixes the sampler's key. For tests only: the statement then says "not private".
        decode: For a source: called on each element, in the threads that read it. Returns `x`,
            `(x, y)` or `(x, y, sample_weight)` of arrays, numbers, or structures of them. It must
            be thread-safe and return new arrays: a buffer that it uses again would mix rows.
        workers: How many threads read and decode for an iterator, when rows are not in memory.
            With a number above 1 the source must bear calls from several threads at a time. None
            takes the number of processors, at most 8, and calls a source from one thread at a
            time, unless its type is known to bear more: the `ArrayRecordDataSource` of Grain and
            of array_record, and what `sources.load` returns. `decode` runs in all threads.

    Raises:
        TypeError: The data or an argument has the wrong type.
        ValueError: The number of rows is not `num_examples`, or a value is out of range.
        PrivacyError: A source or `decode` gives one array for several rows, or `__getitems__` of
            a source gives others than `__getitem__`.
        RuntimeError: The first, middle or last row of a source cannot be read.

    Example:
        >>> import keras_bandmf as bandmf
        >>> import numpy as np
        >>> plan = bandmf.TrainingPlan(
        ...     num_examples=100, batch_size=10, epochs=2, num_bands=2,
        ...     noise_multiplier=1.0, delta=1e-5, sampling="fixed_order",
        ... )
        >>> x = np.arange(100)
        >>> batches = plan.batches(x, seed=0)  # a seed is for tests only
        >>> first, again = batches.indices(0), batches.indices(10)
        >>> len(first), bool(np.all(first == again))
        (10, True)
        >>> batch = batches.batch(0)
        >>> batch["mask"].shape, int(batch["mask"].sum())
        ((11,), 10)
        >>> sorted(batch["x"][batch["mask"]].tolist()) == sorted(first.tolist())
        True
    """

    def __init__(
        self,
        x: Any,
        y: Any = None,
        sample_weight: Any = None,
        *,
        schedule: Schedule,
        plan_fingerprint: str,
        unit: Any = None,
        rows_per_unit: int = 1,
        augment: Callable[..., Any] | None = None,
        augment_copies: int = 1,
        class_weight: dict[int, float] | None = None,
        preprocess: Callable[..., Any] | None = None,
        seed: int | None = None,
        decode: Callable[[Any], Any] | None = None,
        workers: int | None = None,
    ):
        checked_schedule(schedule)
        seed_key = None if seed is None else key_from_seed(seed)
        refuse_alone("rows_per_unit", rows_per_unit, "unit", unit)
        refuse_alone("augment_copies", augment_copies, "augment", augment)
        refuse_rows_that_count_as_one(schedule, unit, augment_copies)
        units = None if unit is None else Units(unit, schedule.num_examples, rows_per_unit)
        num_rows = schedule.num_examples if units is None else units.num_rows
        store = open_store(x, y, sample_weight, num_rows, class_weight, preprocess, decode, workers)
        views = None if augment is None else Augmentation(augment, augment_copies, store.spec())
        self._begin(schedule, store, plan_fingerprint, seed, units, views)
        if views is not None:
            views.warn_if_frozen(store.rows(np.arange(min(8, num_rows))))
        if seed_key is not None:
            self._set_key(seed_key)

    def _begin(
        self,
        schedule: Schedule,
        store: Store,
        plan_fingerprint: str,
        seed: int | None,
        units: Units | None = None,
        augmentation: Augmentation | None = None,
    ) -> None:
        """Sets the fields of a run that has no key yet."""
        self._units = units
        self._augmentation = augmentation
        self._schedule = schedule
        self._store = store
        self._plan_fingerprint = plan_fingerprint
        self._seed = seed
        self._key: np.ndarray | None = None
        self._draws: Draws | None = None
        self._cursor = 0
        self._few_sizes: dict[int, tuple[int, ...]] = {}

    @property
    def plan_fingerprint(self) -> str:
        """The fingerprint of the plan that made these batches."""
        return self._plan_fingerprint

    @property
    def num_examples(self) -> int:
        """The plan's public number of examples."""
        return self._schedule.num_examples

    @property
    def batch_size(self) -> int:
        """The plan's batch size: exact in a fixed order, else expected (see `Schedule`)."""
        return self._schedule.batch_size

    @property
    def num_steps(self) -> int:
        """The number of steps of the run."""
        return self._schedule.num_steps

    @property
    def num_bands(self) -> int:
        """The number of bands, and of the random groups of a law that draws any."""
        return self._schedule.num_bands

    @property
    def sampling(self) -> SamplingName:
        """The name of the sampling law, as in the plan."""
        return self._schedule.sampling

    @property
    def steps_per_epoch(self) -> int:
        """The number of steps of an epoch, `num_examples // batch_size`."""
        return self._schedule.steps_per_epoch

    @property
    def counts_units(self) -> bool:
        """Whether units of several rows are drawn, and not rows."""
        return self._units is not None

    @property
    def rows_per_example(self) -> int:
        """The number of consecutive rows of a batch that are one example, clipped once."""
        rows = 1 if self._units is None else self._units.rows_per_unit
        return rows if self._augmentation is None else rows * self._augmentation.copies

    @property
    def seed(self) -> int | None:
        """The fixed seed of a test, or None."""
        return self._seed

    @property
    def bound(self) -> bool:
        """Whether the sampler has its key."""
        return self._key is not None

    @property
    def cursor(self) -> int:
        """The step at which the next new iterator starts."""
        return self._cursor

    @cursor.setter
    def cursor(self, step: int) -> None:
        step = checked_int("cursor", step, 0)
        if step > self.num_steps:
            raise ValueError(
                f"Expected `cursor` to be at most num_steps={self.num_steps}. "
                f"Received: cursor={step}."
            )
        self._cursor = step

    def bind(self, key: np.ndarray) -> None:
        """Gives the sampler its key, once and for all.

        The same key again does nothing. With `seed=` the seed's key stays, whatever `key` is.
        `fit` calls this; only a custom training loop needs to.

        Args:
            key: (2,) uint64, secret and used for sampling alone.

        Raises:
            TypeError: `key` is not an array of uint64.
            ValueError: Its shape is not (2,), it is all zeros, or another key is bound.

        Example:
            >>> import keras_bandmf as bandmf
            >>> import numpy as np
            >>> plan = bandmf.TrainingPlan(
            ...     num_examples=100, batch_size=10, epochs=2, num_bands=2,
            ...     noise_multiplier=1.0, delta=1e-5,
            ... )
            >>> batches = plan.batches(np.zeros(100))
            >>> batches.bind(np.random.SeedSequence().generate_state(2, np.uint64))
            >>> batches.bound
            True
        """
        key = checked_key(key)
        if self._seed is not None:
            return
        if self._key is None:
            self._set_key(key)
        elif not np.array_equal(self._key, key):
            raise ValueError(
                "Expected the sampler key that these batches are bound to. Received: the key of "
                "another run. A new key would regroup the examples, and one could take part in "
                "adjacent steps, which the privacy statement does not cover. To train another "
                "model, or the same one from the start, make new batches with "
                "`plan.batches(...)`; to continue a run, restore its optimizer state before `fit`."
            )

    def _set_key(self, key: np.ndarray) -> None:
        # Draws first: a failure in between must not leave a key without its draws.
        self._draws = self._schedule.draws(key)
        self._key = key

    def __getstate__(self) -> dict[str, Any]:
        """Warns that a pickle, or another copy, of bound batches is secret."""
        if self._key is not None and self._seed is None:
            warnings.warn(
                "This pickle or copy holds the data and the sampler's key of a private run. Once "
                "the key is known, sampling no longer amplifies privacy. Keep the copy as secret "
                "as the data, or pickle batches that no `fit` has used.",
                stacklevel=2,
            )
        return self.__dict__.copy()

    def digest(self) -> bytes:
        """Returns 32 bytes that depend on the sampler's key, the rows and their order.

        A run that is continued must find the same digest: an example is its row number, and
        another order or key would let it take part in adjacent steps. The digest is keyed, and
        must be kept as secret as the key. Of rows that are not in memory it takes those at 1,024
        positions that the key chooses.

        Returns:
            The digest.

        Raises:
            RuntimeError: No key is bound.
        """
        key = self._bound_key().tobytes()
        rows = self._store.digest(key)
        if self._units is None:
            return rows
        return hashlib.blake2b(rows + self._units.digest(key), key=key, digest_size=32).digest()

    def padded_size(self, num_replicas: int = 1) -> int:
        """Returns P, the largest usual number of examples of a padded batch, over all replicas.

        Args:
            num_replicas: Number of replicas that share a batch.

        Returns:
            P, a multiple of `num_replicas`; see `Schedule.padded_sizes`. A batch has
            `rows_per_example` rows for each.

        Raises:
            TypeError: `num_replicas` is not an integer.
            ValueError: `num_replicas` is below 1.
        """
        return self._schedule.padded_size(num_replicas)

    def indices(self, t: int) -> np.ndarray:
        """Returns the examples of step t.

        Args:
            t: The step, 0 <= t < num_steps.

        Returns:
            (k,) int64 without repetition: row numbers, or numbers of units; k may be 0 under
            cyclic Poisson.

        Raises:
            RuntimeError: No key is bound.
            ValueError: t is not a step of the plan.
        """
        draws = self._bound_draws()
        return draws.indices(self._checked_step(t))

    def _checked_step(self, t: int) -> int:
        t = checked_int("t", t, 0)
        if t >= self.num_steps:
            raise ValueError(
                f"Expected `t` to be a step of the plan, below {self.num_steps}. Received: t={t}. "
                "Make a plan with more steps: the privacy statement covers no step after the last."
            )
        return t

    def raw_spec(self) -> dict[str, Any] | None:
        """Returns the specs of the rows as they were given, None after a `preprocess`."""
        return self._store.raw_spec()

    def preprocessed_by(self, preprocess: Callable[..., Any]) -> None:
        """Turns raw rows into those that a model takes: `fit` of a keras_hub task calls it.

        Args:
            preprocess: As in `plan.batches`; called on one row at a time. Where there was one
                already, nothing happens.
        """
        self._store = self._store.preprocessed_by(preprocess)

    def rows(self, indices: np.ndarray) -> dict[str, Any]:
        """Returns rows by their numbers, without padding and before augmentation.

        With `unit`, these are still numbers of rows, and not those of units, as `indices` returns.

        Args:
            indices: (k,) integers.

        Returns:
            Dict of `"x"`, and `"y"`, `"sample_weight"` when there are any: structures of arrays.

        Raises:
            TypeError: `indices` is not a vector of integers.
            ValueError: A number is not that of a row.
        """
        return self._store.rows(indices)

    def first_rows(self) -> dict[str, Any]:
        """Returns the first rows as training will see them, to build and check a model on.

        Returns:
            The same as `rows` of as many rows as a batch has, or all there are, each of them
            augmented once, with random numbers that are the same for all runs.
        """
        count = min(self.batch_size * self.rows_per_example, self._store.num_examples)
        rows = self._store.rows(np.arange(count))
        if self._augmentation is None:
            return rows
        return self._augmentation.one_view_of(rows, stream=0)

    def batch(self, t: int, num_replicas: int = 1, few_sizes: bool = True) -> dict[str, Any]:
        """Returns the padded batch of step t.

        Args:
            t: The step, 0 <= t < num_steps.
            num_replicas: Number of replicas that share it.
            few_sizes: Whether batches have one of the `padded_sizes` of the schedule, or a multiple
                of the last one, because something is compiled for each size. If not, there is no
                more padding than what rounds the draw up to a multiple of `8 * num_replicas` (of
                `num_replicas`, in a fixed order).

        Returns:
            Dict of `"x"`, `"y"`, `"sample_weight"` (the last two when there are any) and
            `"mask"`, (size * rows_per_example,) bool: true for the rows of `indices(t)`, which
            stand at secret random places. The others are copies of random rows of the data, the
            sentinels of `clipped_gradients`: at least one example for each replica.

        Raises:
            RuntimeError: No key is bound.
            ValueError: t is not a step of the plan.
        """
        self._bound_draws()
        num_replicas = checked_int("num_replicas", num_replicas)
        step = self._checked_step(t)
        rows = self._padded(self._store, step, num_replicas, few_sizes)
        return rows if self._augmentation is None else self._augmentation.of_arrays(rows)

    def _padded(self, store: Store, t: int, num_replicas: int, few_sizes: bool) -> dict[str, Any]:
        return self._arranged(store, self.indices(t), t, num_replicas, few_sizes)

    def _size(self, count: int, num_replicas: int, few_sizes: bool) -> int:
        """Returns the examples of the padded batch of a draw of `count`: more than were drawn."""
        if not few_sizes:
            return self._schedule.law.fitted_size(count, num_replicas)
        # Never cut: an example that is dropped leaves the law the accounting assumes.
        sizes = self._few_sizes.get(num_replicas)
        if sizes is None:  # quantiles take a while
            sizes = self._few_sizes[num_replicas] = self._schedule.padded_sizes(num_replicas)
        needed = count + num_replicas
        return next((size for size in sizes if size >= needed), round_up(needed, sizes[-1]))

    def _arranged(
        self,
        store: Store,
        indices: np.ndarray,
        t: int,
        num_replicas: int,
        few_sizes: bool = True,
    ) -> dict[str, Any]:
        """Returns rows of a store and copies of others, at the places that step t has for them."""
        count = len(indices)
        size = self._size(count, num_replicas, few_sizes)
        places, words = arrangement(self._bound_key(), t, count, size, num_replicas)
        mask = np.zeros(size, bool)
        mask[places] = True
        examples = np.empty(size, np.int64)
        examples[places] = indices
        total = store.num_examples if self._units is None else self.num_examples
        examples[~mask] = words % np.uint64(total)
        rows = examples
        if self._units is not None:
            of_units = self._words(UNIT_ROWS, t, places, size, self._units.rows_per_unit)
            chosen = self._units.choose(examples, of_units)
            rows, mask = chosen.numbers.reshape(-1), (mask[:, None] & chosen.valid).reshape(-1)
        batch = store.rows(rows) | {"mask": mask}
        if self._augmentation is not None:
            seeds = self._words(VIEWS, t, places, size, 2 * self.rows_per_example)
            batch["seeds"] = seeds.view(np.int64).reshape(len(rows), -1, 2)
        return batch

    def _words(self, purpose: int, t: int, places: np.ndarray, size: int, width: int) -> np.ndarray:
        """Returns (size, width) random uint64: those of the i-th drawn example at its place.

        They depend on the key, the step and i, and so are the same for any number of replicas.
        """
        words = np.zeros((size, width), np.uint64)
        drawn = bit_stream(self._bound_key(), purpose, t).random_raw(len(places) * width)
        words[places] = np.reshape(drawn, (-1, width))
        return words

    def element_spec(self, num_replicas: int = 1) -> dict[str, Any]:
        """Returns the specs of the elements of `dataset(num_replicas)`.

        Args:
            num_replicas: Number of replicas that share a batch.

        Returns:
            A structure of `tf.TensorSpec`, in the form of what `batch` returns; the leading
            dimension is None.
        """
        checked_int("num_replicas", num_replicas)
        spec = self._store.spec() if self._augmentation is None else self._augmentation.spec()
        return spec | {"mask": tf.TensorSpec((None,), tf.bool)}

    def dataset(self, num_replicas: int = 1, few_sizes: bool = True) -> tf.data.Dataset:
        """Returns the batches from `cursor` on, as a dataset that ends after the last step.

        A new iterator reads `cursor` when it is asked for its first batch, and nothing after
        that: it counts on by itself, however far prefetching runs ahead and whatever other
        iterators do. The key may be bound after this call, but before the first batch.

        Args:
            num_replicas: Number of replicas that share a batch.
            few_sizes: See `batch`.

        Returns:
            A prefetched dataset of dicts; see `batch`.
        """
        num_replicas = checked_int("num_replicas", num_replicas)
        spec = self._store.spec() | {"mask": tf.TensorSpec((None,), tf.bool)}
        if self._augmentation is not None:
            copies = self._augmentation.copies
            spec["seeds"] = tf.TensorSpec((None, copies, 2), tf.int64)
        dataset = tf.data.Dataset.from_generator(
            lambda: self._from_cursor(num_replicas, few_sizes), output_signature=spec
        )
        if self._augmentation is not None:
            dataset = dataset.map(self._augmentation)
        options = tf.data.Options()
        options.deterministic = True
        # There is nothing to tune, and the thread that would tune may miss that it is to end: an
        # iterator that was collected while a later model was traced held it up for up to a minute.
        options.autotune.enabled = False
        options.experimental_distribute.auto_shard_policy = (
            tf.data.experimental.AutoShardPolicy.DATA
        )
        return dataset.prefetch(tf.data.AUTOTUNE).with_options(options)

    def _from_cursor(self, num_replicas: int, few_sizes: bool) -> Iterator[dict[str, Any]]:
        # The threads of the reader end with this generator, which `tf.data` closes.
        with self._store.reader() as store:
            for t in range(self._cursor, self.num_steps):
                yield self._padded(store, t, num_replicas, few_sizes)

    @contextlib.contextmanager
    def reading(self) -> Iterator[None]:
        """Ends the threads of all iterators made within, at the end of the context.

        `fit` uses it, so that no thread is left where an exception still holds an iterator.
        """
        try:
            with self._store.closing_readers():
                yield
        except BaseException:
            # The frames of the exception keep an iterator in a cycle. TensorFlow would destroy it
            # when the interpreter is gone, and wait for ever for the generator in it.
            atexit.unregister(gc.collect)  # once is enough
            atexit.register(gc.collect)
            raise

    def __iter__(self) -> Iterator[dict[str, tf.Tensor]]:
        self._bound_draws()
        return iter(self.dataset())

    def __len__(self) -> int:
        return self.num_steps

    def __getattr__(self, name: str) -> Any:
        raise missing_attribute(type(self).__name__, name)

    def __repr__(self) -> str:
        # Never the key. Keras prints this where it finds batches that only a private `fit` takes.
        return (
            f"<PrivateBatches sampling={self.sampling!r} num_examples={self.num_examples} "
            f"batch_size={self.batch_size} num_steps={self.num_steps} "
            f"num_bands={self.num_bands} cursor={self.cursor} bound={self.bound}; {WHERE_TO_PASS}>"
        )

    def _bound_draws(self) -> Draws:
        return self._bound()[1]

    def _bound_key(self) -> np.ndarray:
        return self._bound()[0]

    def _bound(self) -> tuple[np.ndarray, Draws]:
        if self._key is None or self._draws is None:
            raise RuntimeError(
                "These batches have no sampler key yet, so they cannot be drawn. Pass them to "
                "`fit` of a privatized model, which binds the key of its run. In a custom loop, "
                "call `batches.bind(key)` with two secret uint64; in a test, pass "
                "`plan.batches(..., seed=0)`."
            )
        return self._key, self._draws
