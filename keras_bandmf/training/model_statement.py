"""statement(model): what ran on the weights of a model, and what it guarantees."""

from __future__ import annotations

import dataclasses

import keras

from keras_bandmf.planning.statement import Statement
from keras_bandmf.record import fresh, history
from keras_bandmf.record.composition import compose
from keras_bandmf.training.private_training import private_training


def statement(model: keras.Model, delta: float | None = None) -> Statement:
    """Returns the privacy statement of a model: what ran on its weights, and what it guarantees.

    Runs belong to the weights: the statement is of all of them, whichever model, optimizer or loop
    made their steps, composed into one epsilon (see `composition.compose`).

    Formal guarantees:
        See `RunRecord.statement`: all steps of a plan are charged unless fewer were fixed in
        advance, and a fixed seed withdraws the claim. Every run that a `BandMFOptimizer` made on
        any weight of the model in this process is in it, and those that a restored optimizer or
        `privatize(model, history=...)` brought, with every run that trained weights which their
        gradients ran through when they were trained. Weights whose values were not shown to be
        initial ones, or those that the last `fit` or a restored checkpoint left, are named in a
        caveat; without any private step the claim is withdrawn then. Not seen are changes between
        the steps of a `fit` (by callbacks, which are named) or of a compiled loop.

    Args:
        model: a model made private and compiled with a `BandMFOptimizer`, or any model whose
            weights private runs have trained.
        delta: the delta of a composed statement; that of the last run if None.

    Raises:
        ValueError: if the model is not private, a restore failed, or the runs cannot be composed.
    """
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
