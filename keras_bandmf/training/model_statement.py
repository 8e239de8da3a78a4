"""The privacy statement of a model: what ran on its weights, and what that guarantees."""

from __future__ import annotations

import dataclasses

import keras

from keras_bandmf.planning.statement import Statement
from keras_bandmf.record import fresh, history
from keras_bandmf.record.composition import compose
from keras_bandmf.training.private_training import private_training


def statement(model: keras.Model, delta: float | None = None) -> Statement:
    """Returns the privacy statement of a model: what ran on its weights, and what it guarantees.

    Runs belong to the weights. The statement covers all runs on them, whichever model, optimizer or
    loop made the steps, and composes them into one epsilon (see `composition.compose`).

    Formal guarantees:
        See `RunRecord.statement`: all steps of a plan are charged unless fewer were fixed in
        advance, and a fixed seed withdraws the claim. The statement includes every run that a
        `BandMFOptimizer` made on any weight of the model in this process, the runs that a restored
        optimizer or `privatize(model, history=...)` brought, and every run that trained weights
        which their gradients ran through when they were trained. If the values of a weight were
        not shown to be initial ones, or those that the last `fit` or a restored checkpoint left, a
        caveat names the weight; if moreover no private step was made, the claim is withdrawn. Not
        seen are changes between the steps of a `fit` (by callbacks, which are named) or of a
        compiled loop.

    Args:
        model: A model made private and compiled with a `BandMFOptimizer`, or any model whose
            weights private runs have trained.
        delta: The delta of a composed statement. None takes that of the last run.

    Returns:
        The statement. `print` shows it, and `to_json` writes it.

    Raises:
        ValueError: If the model is not private, a restore failed, or the runs cannot be composed.

    Example:
        >>> import keras, numpy as np
        >>> import keras_bandmf as bandmf
        >>> plan = bandmf.TrainingPlan(
        ...     num_examples=100, batch_size=10, epochs=2, noise_multiplier=2.0, delta=1e-5,
        ...     num_bands=2)
        >>> model = bandmf.privatize(keras.Sequential([keras.Input((3,)), keras.layers.Dense(1)]))
        >>> model.compile(bandmf.BandMFOptimizer("sgd", plan, l2_norm_clip=1.0), loss="mse")
        >>> batches = plan.batches(np.zeros((100, 3)), np.zeros((100, 1)))
        >>> history = model.fit(batches, epochs=2, verbose=0)
        >>> statement = bandmf.statement(model)
        >>> statement.private, statement.delta, statement.steps_charged
        (True, 1e-05, 20)
        >>> statement.epsilon == plan.epsilon()
        True
    """
    if not isinstance(model, keras.Model):
        raise TypeError(
            "Expected `model` to be a keras.Model of Keras 3. Received: model of type "
            f"{type(model).__name__}."
        )
    every = (run.statement() for run in history.runs_of(model.weights))
    statements = [one for one in every if one.steps_charged]
    ran = bool(statements)
    if not ran:
        statements = [private_training(model).optimizer.record.statement()]
    fresh.note_initializers(model)
    whole = compose(statements, delta)
    caveats = [*history.caveats(model.weights), *whole.caveats]
    whole = dataclasses.replace(whole, caveats=tuple(dict.fromkeys(caveats)))
    lost = history.unknown(model.weights) or history.changed(model.weights)
    if lost and not ran and whole.private:
        reason = "no private step was made, and where the weights come from is unknown"
        whole = dataclasses.replace(whole, private=False, not_private_reason=reason)
    return whole
