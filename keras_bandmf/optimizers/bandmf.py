"""BandMFOptimizer: correlated noise on clipped sums, then any Keras optimizer."""

from __future__ import annotations

import contextlib
import copy
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import keras
import numpy as np
import tensorflow as tf

from keras_bandmf import _distribution
from keras_bandmf._checks import PrivacyError
from keras_bandmf._keras_internals import CheckpointHooks, optimized_variables, own_variables
from keras_bandmf.clipping import ClippedGradients, ClippingMode, checked_mode
from keras_bandmf.clipping.modes import ClippingName
from keras_bandmf.optimizers.adapted_norm import adapts, with_adapted_norm
from keras_bandmf.optimizers.arguments import (
    NoiseMode,
    check_accounted,
    check_arguments,
    check_clipped,
    check_noised,
    check_origin,
    checked_inner,
    fingerprint,
    noise_stddev,
)
from keras_bandmf.optimizers.noise_aware import refuse_unknown_noise, tell_noise
from keras_bandmf.optimizers.plain_gradients import RefusesPlainGradients
from keras_bandmf.optimizers.state import RunState, checked_fields, is_of_no_run, state_of_no_run
from keras_bandmf.planning.plan import TrainingPlan
from keras_bandmf.planning.plan_target import CalibrationOptions, PlanOfRun, PlanTarget
from keras_bandmf.record import fresh, history
from keras_bandmf.record.run_record import RunRecord
from keras_bandmf.rgp.run import RunCarriers

if TYPE_CHECKING:
    from typing_extensions import Unpack


@keras.saving.register_keras_serializable(package="keras_bandmf")
class BandMFOptimizer(CheckpointHooks, RefusesPlainGradients, keras.optimizers.Optimizer):
    """Wraps another optimizer and adds correlated noise to the clipped gradients (DP-BandMF).

    Each step takes the sum of the clipped gradients of a batch, adds the next row of the correlated
    noise `C^-1 Z`, divides by the expected batch size, and passes the result to the inner optimizer
    (McKenna, arXiv 2405.15913). `C` is the strategy of the plan: a banded matrix that says how the
    noise of different steps is correlated. `Z` is independent Gaussian noise, a row for each step.
    Use the optimizer with a model made private by `keras_bandmf.privatize`.

    Formal guarantees:
        With batches drawn by `plan.batches` and gradients clipped by `clipped_gradients` at the
        norm `l2_norm_clip`, the weights after each step are a post-processing of the matrix
        mechanism whose privacy is `plan.epsilon(steps)` at `plan.delta`: the noise is scaled to
        `clipping.sensitivity(l2_norm_clip)` and to what float32 and the noise's lattice add to it
        (`noise.lattice.charged_norm`, which also says what is assumed of float32); the noise's
        cut tail costs less than the share of delta set aside for it. Gradients are accepted only
        as `ClippedGradients` of that very norm and mode, and only while batches of the plan are
        being consumed (or if the plan declares participations). No step after the plan's last one
        changes a weight to anything but NaN.

    Args:
        optimizer: The inner optimizer: a name, a config, or a `keras.optimizers.Optimizer`. Adam
            that knows the noise is `keras_bandmf.NoiseAwareAdam`.
        plan: The `TrainingPlan` of the run. Leave it out to have the first `fit` on arrays make one
            for `epsilon` and `delta`, with `TrainingPlan.calibrate`, from the number of rows, the
            batch size and the epochs: see `PlanTarget.plan_for`. It is then part of the config and
            of checkpoints, and serves every later `fit`.
        l2_norm_clip: The bound on the L2 norm of the gradient of an example, the same for the whole
            run.
        clipping: "flat" (the default), "per_layer", "automatic", "adaptive", or a mode with
            settings, such as `keras_bandmf.clipping.PerLayerClipping({"embedding": 4.0})`.
        noise: "default" or "exact". With "exact" there are no numerical assumptions: each value of
            the noise is the rounding of an exact normal (see `noise.CorrelatedNoise`), and norms
            and sums of gradients are computed in float64 (see `noise.lattice.charged_norm`). The
            noise costs four to six times as much, the clipped sums about five times on a processor;
            with a GPU the noise costs 30 to 160 times as much (docs/gpu.md). `fit` may be compiled
            by XLA; `apply_clipped` in a program of XLA of your own is refused.
        seed: An integer, for tests only: anyone can recompute the noise, and the statement says
            "not private". Else the operating system draws the keys, also after `set_random_seed`.
        replay: Whether to keep the noise key when a checkpoint is restored, which repeats, bit for
            bit where the device's kernels repeat (docs/gpu.md), steps that were never released. By
            default a new key is drawn.
        name: The name of the optimizer.
        epsilon: The target of a plan that is to be made; only without `plan`.
        delta: See `epsilon`. Use a value below 1 / (number of rows).
        **calibration: With `epsilon`, any of `num_bands`, `sampling`, `max_bands` and
            `amplification` of `TrainingPlan.calibrate`, and `epochs`: those of all calls of `fit`
            together, which are those of the first `fit` if left out.

    Raises:
        TypeError: If an argument is of the wrong type.
        ValueError: If an argument is out of range, or a setting of the inner optimizer would change
            which value is released.

    Example:
        >>> import keras, numpy as np
        >>> import keras_bandmf as bandmf
        >>> plan = bandmf.TrainingPlan.calibrate(
        ...     num_examples=100, batch_size=10, epochs=2, epsilon=2.0, delta=1e-5, num_bands=2)
        >>> model = bandmf.privatize(keras.Sequential([keras.Input((3,)), keras.layers.Dense(1)]))
        >>> optimizer = bandmf.BandMFOptimizer("adam", plan, l2_norm_clip=1.0)
        >>> model.compile(optimizer, loss="mse")
        >>> x, y = np.zeros((100, 3), np.float32), np.zeros((100, 1), np.float32)
        >>> history = model.fit(plan.batches(x, y), epochs=2, verbose=0)
        >>> optimizer.steps_done
        20

        Without a plan, the first `fit` makes it:

        >>> optimizer = bandmf.BandMFOptimizer("adam", epsilon=2.0, delta=1e-5, num_bands=2)
        >>> model.compile(optimizer, loss="mse")
        >>> history = model.fit(x, y, batch_size=10, epochs=2, verbose=0)
        >>> optimizer.plan == plan
        True
    """

    def __init__(
        self,
        optimizer: str | dict | keras.optimizers.Optimizer | None = None,  # None is refused
        plan: TrainingPlan | None = None,
        l2_norm_clip: float = 1.0,
        *,
        clipping: ClippingName | ClippingMode = "flat",
        noise: NoiseMode = "default",
        seed: int | None = None,
        replay: bool = False,
        name: str | None = None,
        epsilon: float | None = None,
        delta: float | None = None,
        **calibration: Unpack[CalibrationOptions],
    ):
        inner = checked_inner(optimizer, plan, calibration)
        check_arguments(plan, l2_norm_clip, seed, noise, replay)
        target = PlanTarget.of_arguments(plan, epsilon, delta, calibration)
        super().__init__(learning_rate=0.0, name=name or "bandmf")
        self._inner_optimizer = inner
        self._plan_of_run = PlanOfRun(plan, target)
        self._l2_norm_clip = float(l2_norm_clip)
        self._clipping = checked_mode(clipping)
        refuse_unknown_noise(inner, self._clipping)
        self._noise: NoiseMode = noise
        self._seed, self._replay = seed, replay
        words = self._clipping.describe(self._l2_norm_clip)
        self._record = RunRecord(self._plan_of_run, self._l2_norm_clip, words, seed is not None)
        self._run_state: RunState | None = None
        self._build_later: Callable[[], None] | None = None
        self._waiting: tuple[keras.Variable, ...] = ()
        self._data_source: tuple[str, int] | None = None
        self._noised_variables: tuple[int, ...] = ()

    # Read-only: the noise is scaled to plan and clip norm once, when the optimizer is built.
    @property
    def inner_optimizer(self) -> keras.optimizers.Optimizer:
        """The optimizer that gets the noisy gradients."""
        return self._inner_optimizer

    @property
    def plan(self) -> TrainingPlan:
        """The plan of the run.

        Raises:
            ValueError: If the first `fit` is to make it.
        """
        return self._plan_of_run.plan

    @property
    def plan_of_run(self) -> PlanOfRun:
        """Holds the plan, or the target for which the first `fit` makes it."""
        return self._plan_of_run

    @property
    def l2_norm_clip(self) -> float:
        """The bound on the L2 norm of the gradient of an example."""
        return self._l2_norm_clip

    @property
    def clipping(self) -> ClippingMode:
        """The clipping mode, which says how gradients are brought to that bound."""
        return self._clipping

    @property
    def noise(self) -> NoiseMode:
        """How noise is rounded to its lattice: "default" or "exact"."""
        return self._noise

    @property
    def float64_sums(self) -> bool:
        """Whether gradients must be summed in float64, as exact noise needs."""
        return self._noise == "exact"

    @property
    def seed(self) -> int | None:
        """The fixed seed of a test, or None."""
        return self._seed

    @property
    def replay(self) -> bool:
        """Whether the noise key is saved, and kept on restore."""
        return self._replay

    @property
    def record(self) -> RunRecord:
        """The record of what ran, which the variables keep (see `keras_bandmf.statement`)."""
        return self._record

    def build(self, variables: Sequence[keras.Variable]) -> None:
        """Creates the keys, the ring of noise, and the slots of the inner optimizer.

        From then on the variables keep the record of the run. While there is no plan, only the
        slots are made: the rest follows in the first `fit`, or with a checkpoint.

        Args:
            variables: The trainable variables of the model.

        Raises:
            ValueError: If there are none, or the plan cannot train them.
        """
        if self.built:
            return
        variables = list(variables)
        if not variables:
            raise ValueError("The model has no trainable variable. Received: variables=[]")
        if not self._plan_of_run.known:
            self._wait(variables)
            return
        history.check_plan(variables, self.plan)
        with tf.init_scope():
            # First what can fail: a plan that these variables refuse leaves nothing built.
            plan, clip = self.plan, self.l2_norm_clip
            carriers = RunCarriers(variables, plan.strategy)
            shapes, adapted = with_adapted_norm(carriers.shapes, self.clipping, clip)
            stddev = noise_stddev(plan, self.clipping, clip, shapes, self.float64_sums)
            tell_noise(self.inner_optimizer, plan, stddev, carriers)
            if self._build_later is None:
                self.inner_optimizer.build(variables)
            super().build(variables)
            self._noised_variables = tuple(map(id, variables))
            run = fingerprint(self, variables, carriers.description)
            self._run_state = RunState(
                plan.strategy, stddev, shapes, run, self.seed, carriers, self.float64_sums, adapted
            )
            self._record.follow(self)
            history.begin(variables, self._record)

    def _wait(self, variables: list[keras.Variable]) -> None:
        """Makes the slots, into which Keras may load values, and keeps the rest for later."""
        if self._build_later is None:
            with tf.init_scope():
                self.inner_optimizer.build(variables)
        self._waiting, distribution = tuple(variables), tf.distribute.get_strategy()

        def build() -> None:
            with distribution.scope():
                self.build(variables)

        self._build_later = build

    @property
    def run_state(self) -> RunState:
        """The keys and the noise of the run.

        Raises:
            ValueError: If the optimizer is not built.
        """
        if self._run_state is None:
            self._plan_of_run.plan  # noqa: B018 - says what to do if it is not made yet
            raise ValueError(
                "BandMFOptimizer has no state before it is built. Call `model.fit`, or "
                "`optimizer.build(model.trainable_variables)`, first."
            )
        return self._run_state

    def current_norm(self) -> tf.Tensor | None:
        """Returns the clip norm of the next step, which adaptive clipping changes.

        It comes from noisy sums alone and may be published. Replicas call it in their own context.

        Returns:
            A scalar, float32; None in the other modes.

        Raises:
            ValueError: In a graph, where it would be a constant, before the optimizer is built.
        """
        if not adapts(self.clipping):
            return None
        if self._run_state is None and tf.executing_eagerly():
            return tf.constant(self.l2_norm_clip, tf.float32)
        adapted = self.run_state.adapted
        return None if adapted is None else adapted.read()

    @contextlib.contextmanager
    def accepting(self, source: str) -> Iterator[None]:
        """Accepts gradients during a private `fit`, from the batches named by `source`."""
        previous, self._data_source = self._data_source, (source, threading.get_ident())
        try:
            yield
        finally:
            self._data_source = previous

    def check_restored(self) -> None:
        """Refuses to go on, or to state anything, after a restore that failed.

        Raises:
            ValueError: If the weights may be those of another run.
        """
        self._record.check_restored()

    def check_process(self) -> None:
        """Refuses to train in a fork of the process that drew the noise key.

        Raises:
            PrivacyError: If this is another process.
        """
        if self._run_state is not None:
            self._run_state.noise.check_process()

    def check_ready(self, num_replicas: int) -> None:
        """Refuses to go on where noise, step counter and devices do not belong together.

        Args:
            num_replicas: The number of replicas that are about to train.

        Raises:
            ValueError: If a restore failed, the step counter was moved, no step is left, or the
                noise was made for another number of replicas.
        """
        self.check_restored()
        if not self.built:
            return
        noise = self.run_state.noise
        noise.check_process()
        if noise.num_replicas != num_replicas:
            raise ValueError(
                "The optimizer must be built in the scope of the distribution that trains: its "
                f"noise is made for {noise.num_replicas} replicas. Received: {num_replicas} "
                "replicas. Create, build and compile model and optimizer in `strategy.scope()`."
            )
        step = self.steps_done
        if step != noise.position:
            raise PrivacyError(
                f"The noise is at step {noise.position}, but the inner optimizer is at step "
                f"{step}: the step counter was changed, or a step was interrupted. If the same "
                "noise were added to two gradients, it would cancel out. Restore a checkpoint of "
                "the whole optimizer."
            )
        if step >= self.plan.num_steps:
            raise PrivacyError(self._plan_of_run.spent_message())

    def apply_clipped(
        self,
        clipped: ClippedGradients,
        trainable_variables: Sequence[keras.Variable] | None = None,
        penalties: Sequence[tf.Tensor | None] | None = None,
    ) -> None:
        """Adds the noise of this step to a clipped sum, and updates the variables.

        Call it in a replica context, once for each batch. It counts as one step of the plan.

        Formal guarantees:
            What reaches the inner optimizer is `(sum + (C^-1 Z)_i) / expected_batch_size` plus
            `penalties`, with the public batch size of the plan, whatever the batch held. Sum and
            noise are added exactly, on one lattice: see `noise.CorrelatedNoise`. If rows were
            mixed (`clipped.rows_mixed`) it is NaN. Adaptive clipping multiplies it by a public
            number: see `clipping.AdaptiveClipping`.

        Args:
            clipped: What `keras_bandmf.clipped_gradients` returned for this `l2_norm_clip` and
                clipping mode.
            trainable_variables: The variables that the optimizer was built with, in their order,
                which is the default.
            penalties: Gradients that depend on no example, such as those of weight regularizers,
                or None for variables without one. They are added after the noise.

        Raises:
            TypeError: If `clipped` is anything else.
            ValueError: If it was clipped in another way, its data is not accounted for, or (only
                eagerly) the plan has no step left.

        Example:
            A loop of your own needs a plan that declares the participations of an example:

            >>> import keras, numpy as np
            >>> import keras_bandmf as bandmf
            >>> plan = bandmf.TrainingPlan(
            ...     num_examples=100, batch_size=10, epochs=2, noise_multiplier=5.0, delta=1e-5,
            ...     num_bands=1, sampling="fixed_order", max_participations=2, min_separation=10)
            >>> model = keras.Sequential([keras.Input((3,)), keras.layers.Dense(1)])
            >>> optimizer = bandmf.BandMFOptimizer("sgd", plan, l2_norm_clip=1.0)
            >>> model.compile(optimizer, loss="mse")
            >>> x, y = np.zeros((100, 3), np.float32), np.zeros((100, 1), np.float32)
            >>> for start in range(0, 100, 10):  # one pass: each row is in one batch
            ...     rows = slice(start, start + 10)
            ...     clipped = bandmf.clipped_gradients(model, x[rows], y[rows], l2_norm_clip=1.0)
            ...     optimizer.apply_clipped(clipped, model.trainable_variables)
            >>> optimizer.steps_done
            10
        """
        check_clipped(clipped, self.l2_norm_clip, self.clipping, self.float64_sums)
        source = self._accepted_source()
        check_accounted(self.plan, source, clipped.rows_per_example)
        if trainable_variables is None:
            trainable_variables = optimized_variables(self)
        trainable_variables = list(trainable_variables)
        check_origin(clipped, trainable_variables)
        if source is None:
            self._note_loop(clipped.origin.model, trainable_variables)
        self.build(trainable_variables)
        check_noised(trainable_variables, self._noised_variables)
        replicas = tf.distribute.get_strategy().num_replicas_in_sync
        # Replicas take eager steps one after the other: between them the positions differ.
        eager_step = tf.executing_eagerly() and replicas == 1
        if eager_step or replicas != self.run_state.noise.num_replicas:
            self.check_ready(replicas)
        state, replica = self.run_state, _distribution.replica_id()
        step = tf.convert_to_tensor(self.iterations)
        # Asserts vanish under XLA; a NaN update does not.
        in_budget = tf.where(step < self.plan.num_steps, 1.0, np.nan)
        scale = in_budget / self.plan.schedule.expected_batch_size
        gradients = state.noisy_gradients(clipped, step, replica, scale)
        if replicas > 1:
            # Every replica has the whole gradient, and the inner optimizer adds them up again.
            gradients = [g / replicas for g in gradients]
        if penalties is not None:
            added = zip(gradients, penalties, strict=True)
            gradients = [g if p is None else g + tf.cast(p, g.dtype) for g, p in added]
        pairs = zip(gradients, trainable_variables, strict=True)
        gradients = [tf.cast(g, variable.dtype) for g, variable in pairs]
        self.inner_optimizer.apply(gradients, trainable_variables)
        state.carriers.refresh(step + 1, replica)
        if source is None and eager_step:
            history.remember(clipped.origin.model.weights)

    def _accepted_source(self) -> str | None:
        """Returns the name of the batches of this thread's private `fit`; None outside of one."""
        if self._data_source is None:
            return None
        source, thread = self._data_source
        # A distribution runs the step of each replica in a thread of its own, in its scope.
        own = thread == threading.get_ident() or tf.distribute.has_strategy()
        return source if own else None

    def _note_loop(self, model: keras.Model, trainable_variables: Sequence[keras.Variable]) -> None:
        """Looks at the weights before a step of the user's own loop, or before it is traced."""
        self._record.looped = True
        with tf.init_scope():
            # A replica sees its own part only, so what the weights hold is unknown then.
            if tf.distribute.get_strategy().num_replicas_in_sync == 1:
                if not fresh.is_noted(trainable_variables[0]):
                    fresh.note_initializers(model)
                history.observe(model.weights)
            history.inherit(model.weights, trainable_variables)

    @property
    def variables(self) -> list[keras.Variable]:
        """The variables of the inner optimizer. Keys and ring are not among them."""
        return own_variables(self) + self.inner_optimizer.variables

    @property
    def learning_rate(self) -> keras.Variable | tf.Tensor:
        """The learning rate of the inner optimizer."""
        return self.inner_optimizer.learning_rate

    @learning_rate.setter
    def learning_rate(self, learning_rate: float | tf.Tensor) -> None:
        self.inner_optimizer.learning_rate = learning_rate

    @property
    def iterations(self) -> keras.Variable:
        """The step counter of the inner optimizer."""
        return self.inner_optimizer.iterations

    @property
    def steps_done(self) -> int:
        """The number of updates made, read eagerly. It is 0 before the optimizer is built."""
        return int(keras.ops.convert_to_numpy(self.iterations)) if self.built else 0

    def finalize_variable_values(self, var_list: Sequence[keras.Variable]) -> None:
        """Writes averaged weights, if the inner optimizer keeps them."""
        self.inner_optimizer.finalize_variable_values(var_list)

    def save_own_variables(self, store: Any) -> None:
        """Writes keys and ring: the file is secret. Release models by `keras_bandmf.export`.

        Args:
            store: The store that Keras writes to a file.
        """
        history.refuse_to_forget(self._waiting if self._run_state is None else ())
        if self._run_state is not None:
            for name, value in self._saved_arrays().items():
                store[name] = value

    def load_own_variables(self, store: Any) -> None:
        """Restores ring and sampler key, and draws a new noise key unless `replay` is set.

        Args:
            store: The store that Keras read from a file.

        Raises:
            ValueError: If the optimizer is not built, or the state does not belong to it.
        """
        arrays = {name: np.asarray(store[name]) for name in store.keys()}
        # Nothing was saved without this optimizer, or before the first step: a new run begins.
        if arrays or self.steps_done:
            self._restore(arrays)

    def _saved_arrays(self) -> dict[str, np.ndarray]:
        self.run_state.warn_of_secrets(self.replay)
        past = history.to_array(optimized_variables(self), self._record)
        return {**self.run_state.to_arrays(self.replay), "history": past}

    def _restore(self, arrays: dict[str, np.ndarray]) -> None:
        # Keras may continue after the error, with weights that are no longer those of this run.
        self._record.restore_failed = True
        checked_fields(arrays)  # before any advice: those of another optimizer go into none
        if self._build_later is not None and not self.built:
            self._plan_of_run.take_over(history.planned_in_fit(arrays.get("history")))
            self._build_later()
        if not self.built:
            raise ValueError(
                "Received: the state of a run for an optimizer that is not built. To go on, call "
                "`model.optimizer.build(model.trainable_variables)` after `compile`, then load."
            )
        record, variables = self._record, optimized_variables(self)
        record.update()
        own_steps = record.steps
        self.run_state.from_arrays(arrays, self.replay)
        history.from_array(arrays.get("history"), variables, record, own_steps)
        record.restore_failed = False

    def _checkpoint_tensors(self) -> dict[str, tf.Tensor]:
        # A SavedModel calls it inside a graph.
        if not tf.executing_eagerly():
            raise PrivacyError(
                "A SavedModel of a model compiled with BandMFOptimizer would hold the key and "
                "the state of its noise. Use `keras_bandmf.export(model, path)`."
            )
        # Without a plan there is no run yet. TensorFlow asks for the names when it restores, too.
        waits = self._run_state is None and not self._plan_of_run.known
        history.refuse_to_forget(self._waiting if waits else ())
        arrays = state_of_no_run() if waits else self._saved_arrays()
        return {name: tf.constant(value) for name, value in arrays.items()}

    def _restore_checkpoint_tensors(self, tensors: Mapping[str, tf.Tensor]) -> None:
        arrays = {name: value.numpy() for name, value in tensors.items()}
        if not is_of_no_run(arrays) or self.steps_done:  # else saved before there was a plan
            self._restore(arrays)

    def __reduce__(self) -> tuple:
        """Copies an optimizer by its config. One that is built has secrets, and is refused."""
        if self.built:
            raise PrivacyError(
                "A built BandMFOptimizer cannot be copied or pickled by itself: it has the secret "
                "state of a run, which may continue only once. Copy the config "
                "(`BandMFOptimizer.from_config(optimizer.get_config())`), or save the model. "
                f"Received: a copy of {self.name!r}"
            )
        return type(self).from_config, (self.get_config(),)

    def get_config(self) -> dict[str, Any]:
        """Returns the config. It contains neither keys nor the test seed."""
        return {
            "name": self.name,
            "optimizer": keras.saving.serialize_keras_object(self.inner_optimizer),
            # Of a plan to be made, the target too.
            **(self._plan_of_run.to_facts() or {"plan": self.plan.to_json()}),
            "l2_norm_clip": self.l2_norm_clip,
            "clipping": keras.saving.serialize_keras_object(self.clipping),
            "noise": self.noise,
            "replay": self.replay,
        }

    @classmethod
    def from_config(
        cls, config: dict[str, Any], custom_objects: dict[str, Any] | None = None
    ) -> BandMFOptimizer:
        """Makes an optimizer from what `get_config` returned.

        Args:
            config: The config.
            custom_objects: Classes that the inner optimizer needs, by name.
        """
        # Keras deserializes a learning rate schedule in place.
        config = copy.deepcopy(config)
        inner = keras.saving.deserialize_keras_object(
            config.pop("optimizer"), custom_objects=custom_objects
        )
        clipping = keras.saving.deserialize_keras_object(config.pop("clipping"))
        text, target = config.pop("plan"), config.pop("target", None)
        plan = None if text is None else TrainingPlan.from_json(text)
        if target is None:
            return cls(inner, plan, clipping=clipping, **config)
        optimizer = cls(inner, clipping=clipping, **target, **config)
        if plan is not None:
            optimizer.plan_of_run.settle(plan)
        return optimizer
