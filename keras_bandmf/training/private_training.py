"""Private training of one model instance: `privatize`, and the methods it puts on a model."""

from __future__ import annotations

import contextlib
import functools
import os
import threading
from collections.abc import Callable, Sequence
from typing import Any, Literal, NoReturn

import keras
import tensorflow as tf

from keras_bandmf import clipping
from keras_bandmf._checks import PrivacyError, checked_bool
from keras_bandmf._keras_internals import build_model
from keras_bandmf.clipping.checks.refusals import checked_microbatch_size, refuse_stateful
from keras_bandmf.clipping.clipped import clipped_for_noise
from keras_bandmf.clipping.losses import no_replicas
from keras_bandmf.optimizers.bandmf import BandMFOptimizer
from keras_bandmf.planning.statement import Statement
from keras_bandmf.record import fresh, ledger
from keras_bandmf.record import history as variable_history
from keras_bandmf.sampling import PrivateBatches
from keras_bandmf.training import (
    callback_policy,
    fit_arguments,
    keras_faults,
    low_rank,
    own_batches,
    task_data,
    validation,
)
from keras_bandmf.training.callback_policy import Callbacks
from keras_bandmf.training.logs import StepLogs
from keras_bandmf.training.mixed_rows import MixedRows
from keras_bandmf.training.regularizers import regularization
from keras_bandmf.training.step_gate import StepGate, held
from keras_bandmf.training.step_guard import StepGuard

_ATTRIBUTE = "_keras_bandmf_training"


def privatize(
    model: keras.Model,
    microbatch_size: int | Literal["auto"] | None = None,
    *,
    report_clipping: bool = False,
    history: str | os.PathLike | Statement | None = None,
) -> keras.Model:
    """Makes the training of a model private, in place.

    It replaces `train_step`, `fit` and `save` on this instance, and leaves the class untouched.
    Call it before or after `compile`. `fit` then takes rows as in Keras, or `plan.batches` of them.
    A model that is loaded or cloned is not private, and `BandMFOptimizer` refuses to train it.
    `make_private` is the same function.

    Formal guarantees:
        `fit` trains on batches of the optimizer's own plan only, clips the gradient of each
        example at the norm and in the mode of the optimizer, and lets nothing but noisy sums and
        public values reach the weights. Models that are not known to treat examples independently
        are trained one example at a time, unless their author declares that they do. Before the
        first step that is tested, and in each step a masked row is watched: if it has a gradient,
        the update is NaN and `fit` raises. Python code of layers and losses sees no value of a row
        unless `run_eagerly=True`, and what it keeps then has no noise.

    Args:
        model: Any `keras.Model` of Keras 3 that does not override `train_step`.
        microbatch_size: The largest number of examples whose gradients are computed at a time, to
            bound memory: a number, None for the whole batch, or "auto" for as many as fit into
            1 GiB. It changes neither the result nor the privacy.
        report_clipping: Whether to add `clipped_fraction_not_private` to the logs of each epoch:
            the fraction of examples whose gradient was made smaller by clipping. Like other
            training metrics it is computed without noise, and the statement names it.
        history: What private runs did to the weights before they were loaded: the path of the
            `.keras` file, if a private model saved it, or a `Statement`, or its JSON. It is
            composed into every later statement. It is not needed for weights trained by a
            `BandMFOptimizer` that is loaded with them; but without it, weights that were frozen in
            that run are of unknown history.

    Returns:
        The same model.

    Raises:
        TypeError: If `model` is not a Keras 3 model.
        ValueError: If the model overrides `train_step`, or an argument is out of range.

    Example:
        >>> import keras, numpy as np
        >>> import keras_bandmf as bandmf
        >>> plan = bandmf.TrainingPlan.calibrate(
        ...     num_examples=100, batch_size=10, epochs=2, epsilon=2.0, delta=1e-5, num_bands=2)
        >>> model = bandmf.privatize(keras.Sequential([keras.Input((3,)), keras.layers.Dense(1)]))
        >>> model.compile(bandmf.BandMFOptimizer("adam", plan, l2_norm_clip=1.0), loss="mse")
        >>> x, y = np.zeros((100, 3), np.float32), np.zeros((100, 1), np.float32)
        >>> history = model.fit(plan.batches(x, y), epochs=2, verbose=0)
        >>> bandmf.statement(model).epsilon <= 2.0
        True

        A second run on the same weights is composed with the first one:

        >>> model.compile(bandmf.BandMFOptimizer("adam", plan, l2_norm_clip=1.0), loss="mse")
        >>> history = model.fit(plan.batches(x, y), epochs=2, verbose=0)
        >>> bandmf.statement(model).epsilon > 2.0
        True
    """
    if not isinstance(model, keras.Model):
        raise TypeError(
            "Expected `model` to be a keras.Model of Keras 3. Use `import keras`: under "
            "TF_USE_LEGACY_KERAS=1, which `import tensorflow_transform` sets, `tf.keras` is "
            f"Keras 2. Received: model of type {type(model).__module__}.{type(model).__name__}"
        )
    checked_size = checked_microbatch_size(microbatch_size)
    if model.built:
        fresh.note_initializers(model)
    if history is not None:
        if not model.built:
            raise ValueError(
                "`history` describes the weights of a built model. First call the model once on "
                f"data, or load it. Received: the unbuilt model {model.name!r}"
            )
        variable_history.take_over(model.weights, history)
    existing = getattr(model, _ATTRIBUTE, None)
    if existing is not None:
        existing.set_options(checked_size, report_clipping)
        model.train_function = None
        return model
    for name in ("train_step", "make_train_function", "compute_metrics"):
        if getattr(type(model), name) is not getattr(keras.Model, name):
            raise PrivacyError(
                f"The model must not override `{name}`: the override would see gradients or data "
                f"that are not private. Received: {type(model).__name__}.{name}. Use "
                "`compile(loss=..., metrics=...)`, or write a loop with `clipped_gradients` and "
                "`apply_clipped`."
            )
    training = _PrivateTraining(model, checked_size, report_clipping)
    setattr(model, _ATTRIBUTE, training)
    model.train_step = training.train_step
    model.make_train_function = training.make_train_function
    model.train_on_batch = training.train_on_batch
    model.fit = training.fit
    model.save = training.save
    model.train_function = None
    return model


def private_training(model: keras.Model) -> _PrivateTraining:
    """Returns the private training of a model.

    Raises:
        PrivacyError: If the model is not private.
    """
    training = getattr(model, _ATTRIBUTE, None)
    if training is None:
        raise PrivacyError(
            "The model is not private. Call `keras_bandmf.privatize(model)` first, also after "
            "loading or cloning. Received: " + repr(getattr(model, "name", model))
        )
    return training


def _alone(fit: Callable) -> Callable:
    """Lets only one `fit` of a model, and of an optimizer, run at a time, in all threads."""

    @functools.wraps(fit)
    def alone(self: _PrivateTraining, *args: Any, **kwargs: Any) -> keras.callbacks.History:
        optimizer = self.optimizer
        planning = optimizer.plan_of_run.kept_if(lambda: optimizer.built)
        with held(self.lock), held(optimizer.record.lock), planning:
            return fit(self, *args, **kwargs)

    return alone


class _PrivateTraining:
    """The methods that `privatize` puts on a model, and what they remember about the run."""

    def __init__(
        self, model: keras.Model, microbatch_size: int | str | None, report_clipping: bool
    ):
        self.model = model
        self.set_options(microbatch_size, report_clipping)
        self._mixed_rows = MixedRows(model.distribute_strategy)
        self._checked: tuple[BandMFOptimizer, tuple[int, ...]] | None = None
        self._needs_mask = False
        self._rows_per_example = 1
        self._gate = StepGate()
        self.lock = threading.Lock()
        self._train_function: Callable | None = None
        self._clip: Callable = self._clipped_gradients

    def set_options(self, microbatch_size: int | str | None, report_clipping: bool) -> None:
        """Sets the options of `privatize`."""
        checked_bool("report_clipping", report_clipping)
        self._microbatch_size = microbatch_size
        self._report: callback_policy.ClippedFraction | None = None
        if report_clipping:
            with self.model.distribute_strategy.scope():
                self._report = callback_policy.ClippedFraction()

    @property
    def optimizer(self) -> BandMFOptimizer:
        """The compiled optimizer.

        Raises:
            ValueError: If the model is not compiled with a `BandMFOptimizer`.
        """
        optimizer = getattr(self.model, "optimizer", None)  # Keras sets it in `compile`
        if optimizer is None:
            raise ValueError(
                "The model must be compiled first, with `model.compile(optimizer="
                "keras_bandmf.BandMFOptimizer(...), loss=...)`. Received: the model "
                f"{self.model.name!r}, which has no optimizer."
            )
        if isinstance(optimizer, keras.optimizers.LossScaleOptimizer):
            raise PrivacyError(
                "Under 'mixed_float16' Keras skips steps by looking at the gradients, which is "
                "not private. Use the dtype policy 'mixed_bfloat16' or 'float32'."
            )
        if not isinstance(optimizer, BandMFOptimizer):
            raise ValueError(
                "A private model must be compiled with "
                "`optimizer=keras_bandmf.BandMFOptimizer(...)`. "
                f"Received: optimizer={type(optimizer).__name__}"
            )
        return optimizer

    def save(
        self,
        filepath: str | os.PathLike,
        overwrite: bool = True,
        zipped: bool | None = None,
        **kwargs: Any,
    ) -> None:
        """Saves like `keras.Model.save`; a `.keras` file also gets the history of the weights.

        Args:
            filepath: See `keras.Model.save`, as for the other arguments.
            overwrite: See `filepath`.
            zipped: See `filepath`.
            **kwargs: See `filepath`.
        """
        model = self.model
        type(model).save(model, filepath, overwrite=overwrite, zipped=zipped, **kwargs)
        if variable_history.runs_of(model.weights):
            text = variable_history.to_json(model.weights)
            variable_history.write_member(filepath, text)

    def train_on_batch(self, *args: Any, **kwargs: Any) -> NoReturn:
        """Refuses to train, because the sampling of a single batch is not accounted for."""
        raise PrivacyError(
            "A private model does not train on single batches: their sampling is not accounted "
            "for. Received: a call of `train_on_batch`. Use `model.fit(plan.batches(x, y))`."
        )

    def make_train_function(self, force: bool = False) -> Callable:
        """Makes Keras's train function behind the gate, with XLA in `clipped_gradients` only.

        Noise is drawn several times faster outside of that program, and metrics need dynamic
        shapes.

        Args:
            force: Whether to make a new one even if there is one.
        """
        model = self.model
        # If Keras's own method was called on the model, its train function has no gate.
        if not force and self._train_function and model.train_function is self._train_function:
            return self._train_function
        wanted = model.jit_compile
        compiled = wanted and not model.run_eagerly
        self._clip = (
            tf.function(self._clipped_gradients, jit_compile=True, autograph=False)
            if compiled
            else self._clipped_gradients
        )
        model.jit_compile = False
        try:
            type(model).make_train_function(model, force=True)
        finally:
            model.jit_compile = wanted
        model.train_function = self._train_function = self._gate.guarded(model.train_function)
        return self._train_function

    def train_step(self, data: Any) -> dict[str, Any]:
        """Makes one step of the plan: clips, sums, adds noise, and updates the weights.

        Nothing of it runs before its data is there: where a row cannot be read, a step would
        otherwise have been counted, and its noise drawn, that was not made.
        """
        fetched = [leaf for leaf in keras.tree.flatten(data) if tf.is_tensor(leaf)]
        with tf.control_dependencies(fetched):
            return self._made_step(data)

    def _made_step(self, data: Any) -> dict[str, Any]:
        model, optimizer = self.model, self.optimizer
        self._gate.check_running()
        if self._needs_mask:
            x, y = data["x"], data.get("y")
            sample_weight, mask = data.get("sample_weight"), data["mask"]
        else:
            # The keys cannot tell: an input of the user's own data may be called "mask".
            x, y, sample_weight = keras.utils.unpack_x_y_sample_weight(data)
            mask = None
        clipped = self._clip(x, y, sample_weight, mask)
        self._mixed_rows.note(clipped.rows_mixed)
        variables = model.trainable_variables
        step = StepLogs(model, x, y, sample_weight, clipped)
        step.note_losses()
        optimizer.apply_clipped(clipped, variables, regularization(variables))
        if self._report is not None:
            self._report.note(clipped)
        logs = step.metrics()
        callback_policy.refuse_validation_names(callback_policy.log_names(logs))
        return keras_faults.reducible_logs(model, logs)

    def _clipped_gradients(
        self, x: Any, y: Any, sample_weight: Any, mask: Any
    ) -> clipping.ClippedGradients:
        model, optimizer = self.model, self.optimizer
        optimizer.build(model.trainable_variables)
        return clipped_for_noise(
            model,
            x,
            y,
            sample_weight,
            l2_norm_clip=optimizer.l2_norm_clip,
            clipping=optimizer.clipping,
            mask=mask,
            microbatch_size=self._microbatch_size,
            mask_seeds=optimizer.run_state.mask_seeds(optimizer.iterations),
            float64_sums=optimizer.float64_sums,
            rows_per_example=self._rows_per_example,
            current_norm=optimizer.current_norm(),
        )

    @_alone
    def fit(
        self,
        x: Any = None,
        y: Any = None,
        batch_size: int | None = None,
        epochs: int | None = None,
        verbose: int | Literal["auto"] = "auto",
        callbacks: Callbacks = None,
        validation_split: float = 0.0,
        validation_data: Any = None,
        shuffle: bool | None = None,
        class_weight: dict | None = None,
        sample_weight: Any = None,
        initial_epoch: int = 0,
        steps_per_epoch: int | None = None,
        validation_steps: int | None = None,
        validation_batch_size: int | None = None,
        validation_freq: int | Sequence[int] = 1,
    ) -> keras.callbacks.History:
        """Trains on the batches of the optimizer's plan, and is otherwise like `keras.Model.fit`.

        Rows, as arrays or as a `tf.data.Dataset` of single examples, become `plan.batches`. If the
        optimizer has `epsilon` in place of a plan, its first `fit` makes the plan from the number
        of rows to train on, `batch_size` (by default 32, as in Keras) and `epochs` (1). Later calls
        with the same rows in the same order go on with the run. With batches of a plan, `y`,
        `batch_size`, `validation_split`, `shuffle`, `class_weight` and `sample_weight` are refused:
        they belong to `plan.batches`.

        Args:
            x: Rows, or what `plan.batches` of the optimizer's plan returned. If the plan declares
                participations, everything else is data in the user's own order, which must keep to
                them.
            y: See Keras.
            batch_size: None, or that of the plan.
            epochs: See Keras. None, the default, trains what is left of the plan, or one epoch of
                data whose number of steps is unknown. For rows, more than what is left is refused.
            verbose: See Keras. Unless it is 0, a plan that is made here is shown, once.
            callbacks: See Keras. Callbacks that act on a training metric are refused.
            validation_split: See Keras: the last rows of arrays, by their number alone, are not
                trained on. Refused for data in the user's own order.
            validation_data: See Keras. It must be public or disjoint from the training data.
            shuffle: None or True: the plan draws the rows at random. Data in the user's own order
                is never shuffled.
            class_weight: See Keras. Refused for data in the user's own order.
            sample_weight: See Keras.
            initial_epoch: See Keras.
            steps_per_epoch: At most that of the plan, and by default equal to it.
            validation_steps: See Keras.
            validation_batch_size: See Keras: for rows, by default `batch_size`.
            validation_freq: See Keras.

        Returns:
            Keras's `History`. Its training metrics are not private.

        Raises:
            ValueError: If data or arguments are not accounted for, or no step is left.
        """
        model, optimizer = self.model, self.optimizer
        optimizer.check_process()
        fit_arguments.check_lengths(epochs, initial_epoch, steps_per_epoch)
        validation_freq = validation.checked_frequency(
            validation_data, validation_steps, validation_batch_size, validation_freq
        )
        x, y, sample_weight = task_data.plain_rows(model, x, y, sample_weight)
        way = own_batches.way_of(x, optimizer)
        fit_arguments.check_distribution(model, way == "own order")
        listed = callback_policy.with_epsilon(callback_policy.flat_callbacks(callbacks))
        validates = validation_data is not None or bool(validation_split and way == "rows")
        monitored = callback_policy.check_callbacks(listed, validates)
        low_rank.refuse_backup(model, listed)
        of_rows: list[str] = []
        if way == "rows":
            asked = own_batches.Asked(
                x=x,
                y=y,
                sample_weight=sample_weight,
                class_weight=class_weight,
                validation_split=validation_split,
                validation_data=validation_data,
                batch_size=batch_size,
                shuffle=shuffle,
                epochs=epochs,
                initial_epoch=initial_epoch,
                steps_per_epoch=steps_per_epoch,
                verbose=verbose,
            )
            x, validation_data, of_rows = own_batches.batches_of_rows(
                asked, model, optimizer, listed
            )
            validation_batch_size = validation_batch_size or batch_size  # as in Keras
            y = sample_weight = batch_size = shuffle = None
        else:
            fit_arguments.refuse_changed_data(class_weight, validation_split)
        batches, array_steps = x if isinstance(x, PrivateBatches) else None, None
        if batches is not None:
            fit_arguments.check_batches(
                batches, optimizer.plan, y, batch_size, shuffle, sample_weight, steps_per_epoch
            )
            source = f"plan.batches of plan {batches.plan_fingerprint[:12]}"
            steps_per_epoch = steps_per_epoch or batches.steps_per_epoch
            task_data.preprocess_batches(batches, model)
            self._prepare(batches.first_rows())
        else:
            batch_size, array_steps = fit_arguments.check_foreign_data(
                x, optimizer.plan, batch_size, steps_per_epoch
            )
            sample, x = fit_arguments.first_rows(x, y, sample_weight, optimizer.plan.batch_size)
            task_data.refuse_raw_rows(model, sample["x"])
            self._prepare(sample)
            source = "data supplied by the user, in an order declared by the user"
        rows_per_example = 1 if batches is None else batches.rows_per_example
        if (self._needs_mask, self._rows_per_example) != (batches is not None, rows_per_example):
            # A step traced for one kind of batch must not take the other for it.
            self._needs_mask, self._rows_per_example = batches is not None, rows_per_example
            model.train_function = None
        optimizer.check_ready(model.distribute_strategy.num_replicas_in_sync)
        epochs = fit_arguments.checked_epochs(
            epochs,
            initial_epoch,
            optimizer.plan.num_steps - optimizer.steps_done,
            steps_per_epoch or array_steps,
        )
        if validation_data is not None:
            validation_data = validation.evaluable(
                model, validation_data, validation_batch_size or batch_size, validation_steps
            )
        guard = StepGuard(optimizer, batches, array_steps)
        report = [] if self._report is None else [self._report]
        remarks = [*of_rows, *callback_policy.remarks([*report, *listed], monitored)]
        data = (
            x
            if batches is None
            else batches.dataset(
                model.distribute_strategy.num_replicas_in_sync,
                # XLA compiles clipping for each size; TensorFlow takes any.
                few_sizes=bool(model.jit_compile and not model.run_eagerly),
            )
        )
        with (
            self._gate.during_fit(optimizer, source),
            variable_history.remembering(model.weights),
            ledger.written_down(optimizer.record, model, listed, remarks),
            optimizer.record.fit(source, remarks, epochs - initial_epoch, steps_per_epoch),
            keras_faults.worked_around(model, symbolic_build=batches is None),
            contextlib.nullcontext() if batches is None else batches.reading(),
        ):
            return keras.Model.fit(
                model,
                data,
                y,
                batch_size=batch_size,
                epochs=epochs,
                verbose=verbose,
                callbacks=[self._mixed_rows, *report, *listed, guard, self._gate],
                validation_data=validation_data,
                shuffle=False,
                sample_weight=sample_weight,
                initial_epoch=initial_epoch,
                steps_per_epoch=steps_per_epoch,
                validation_steps=validation_steps,
                validation_batch_size=validation_batch_size,
                validation_freq=validation_freq,
            )

    def _prepare(self, sample: dict[str, Any]) -> None:
        """Builds model and optimizer, and checks once that clipping is exact for this model.

        Args:
            sample: A dict of a few rows: `"x"`, and `"y"` and `"sample_weight"` if there are any.
        """
        model, optimizer = self.model, self.optimizer
        parts = (sample["x"], sample.get("y"), sample.get("sample_weight"))
        fit_arguments.check_trainable(model, sample.get("y"))
        refuse_stateful(model)
        low_rank.refuse_zero_factors(model)
        low_rank.refuse_quantized_logits(model)
        with model.distribute_strategy.scope():
            # Metrics too: made inside a replica, their variables would break the graph.
            build_model(model, keras.tree.map_structure(_symbolic_batch, parts))
            names = [metric.name for metric in model.metrics]
            callback_policy.refuse_validation_names(
                [*names, *(getattr(model, "output_names", None) or [])]
            )
            fresh.note_initializers(model)
            variable_history.observe(model.weights)
            variable_history.check_plan(model.weights, optimizer.plan)
            variable_history.inherit(model.weights, model.trainable_variables)
            optimizer.build(model.trainable_variables)
        state = (optimizer, tuple(id(variable) for variable in model.trainable_variables))
        # `compile` drops the train function: loss and layers may have changed.
        if model.train_function is None or self._checked != state:
            with no_replicas(), fit_arguments.explained():
                clipping.check_model(model, *parts, clipping=optimizer.clipping)
            self._checked = state


def _symbolic_batch(array: Any) -> keras.KerasTensor | None:
    if array is None:
        return None
    dtype = keras.backend.standardize_dtype(array.dtype)
    return keras.KerasTensor((None, *array.shape[1:]), dtype=dtype)
