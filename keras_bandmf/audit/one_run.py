"""`audit_run`: a lower bound on epsilon from one training run, for a user's own plan and model."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal

import keras
import numpy as np
import tensorflow as tf

from keras_bandmf._checks import PrivacyError, checked_choice, checked_float, checked_int
from keras_bandmf.audit.bounds import one_run_lower_bound
from keras_bandmf.audit.participations import (
    check_auditable,
    known_steps,
    log_likelihood_ratios,
)
from keras_bandmf.audit.released import Attacker, recording
from keras_bandmf.audit.report import AuditReport
from keras_bandmf.clipping.losses import batch_loss, build_loss
from keras_bandmf.clipping.row_losses import per_example_losses
from keras_bandmf.planning.plan import TrainingPlan
from keras_bandmf.training.private_training import private_training

#: How many of the canaries are guessed, as fractions: each gets an equal share of the error.
FRACTIONS = (0.04, 0.1, 0.25, 0.6)

_IN_WORDS = {
    "white-box": "white-box: the gradient of each canary, in the released sums of its steps",
    "black-box": "black-box: how far the loss of each canary fell",
}


def audit_run(
    build_model: Callable[[], keras.Model],
    plan: TrainingPlan,
    x: Any,
    y: Any,
    *,
    num_canaries: int | None = None,
    canaries: tuple[Any, Any] | None = None,
    attack: Literal["white-box", "black-box"] = "white-box",
    fractions: Sequence[float] = FRACTIONS,
    confidence: float = 0.95,
    seed: int | None = None,
) -> AuditReport:
    """Attacks one training run, and returns a lower bound on the epsilon that it really has.

    Some rows of the data become canaries. A coin for each decides whether it is trained on, or left
    blank. After the run the attacker guesses the coins, and the more guesses are right, the larger
    epsilon must be (Steinke, Nasr and Jagielski, https://arxiv.org/abs/2305.08846). A bound
    above the plan's epsilon shows that model, optimizer or library do not do what the plan says. A
    bound below it proves nothing more than itself.

    Formal guarantees:
        If the run is (epsilon, `plan.delta`)-differentially private under the adjacency of the
        plan, the bound exceeds epsilon with a probability of at most `1 - confidence`, over the
        coins and the randomness of the run. What this rests on: the coins are fair, independent,
        and used for nothing but the sample weight of their canary, 1 or 0. A row of weight 0 has a
        gradient of exactly zero; since rows are drawn independently of each other, a data set with
        such a row and one without it give the same law of releases, so that a coin changes the data
        by one row added or removed (set to zero, in a fixed order). The attacker gets the released
        gradients (`"white-box"`) or the final model (`"black-box"`), canaries, plan, and of the
        sampling exactly what the accounting gives away: groups or steps of the canaries where it
        counts them as known, and nothing where the plan has a certificate. The numbers of
        guesses are fixed in advance, and `1 - confidence` is divided among them.

    Args:
        build_model: Returns a new model, private (`privatize`) and compiled with a
            `BandMFOptimizer` of `plan`. It is called once.
        plan: The plan whose epsilon is put to the test.
        x: The training data, `plan.num_examples` rows: arrays, or a structure of them.
        y: The targets, in the same form.
        num_canaries: How many rows, chosen at random, become canaries. The default is a
            third of the rows, but at most 1,000. Many canaries find more, but train a worse model.
        canaries: x and y of the canaries. By default they are the rows that they replace,
            with a wrong class drawn at random, for which `y` must hold class numbers or one-hot
            rows.
        attack: "white-box" compares the clipped gradient of each canary with the releases of
            the steps in which it may have taken part (a matched filter through the matrix C of the
            noise); it keeps two numbers for each parameter and step in a temporary folder.
            "black-box" uses how far the loss of each canary fell.
        fractions: The fractions of the canaries on which a guess is made: half of them "in", where
            the score is highest, and half "out". The best of the resulting bounds counts.
        confidence: How surely the bound holds, between 0 and 1.
        seed: Makes coins and canaries repeatable, for tests. The run itself is as random as the
            model's optimizer.

    Returns:
        An `AuditReport`.

    Raises:
        TypeError: If an argument is of the wrong type.
        ValueError: If an argument is out of range, or data, model and plan do not fit together.

    Example:
        >>> import keras, numpy as np
        >>> import keras_bandmf as bandmf
        >>> plan = bandmf.TrainingPlan(
        ...     num_examples=60, batch_size=10, epochs=2, noise_multiplier=1.0, delta=1e-5,
        ...     num_bands=2)
        >>> def build_model():
        ...     model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(3)])
        ...     optimizer = bandmf.BandMFOptimizer("sgd", plan, l2_norm_clip=1.0)
        ...     loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
        ...     bandmf.privatize(model).compile(optimizer, loss=loss)
        ...     return model
        >>> x = np.random.default_rng(0).normal(size=(60, 4)).astype("float32")
        >>> report = bandmf.audit.audit_run(build_model, plan, x, np.arange(60) % 3)
        >>> report.epsilon_lower_bound < report.epsilon
        True
    """
    check_auditable(plan)
    checked_choice("attack", attack, ("white-box", "black-box"))
    checked_float("confidence", confidence, above=0.0, below=1.0)
    rng = np.random.default_rng(None if seed is None else checked_int("seed", seed, 0))
    x, y = (_checked_rows(name, data, plan.num_examples) for name, data in (("x", x), ("y", y)))
    count = _number_of_canaries(num_canaries, canaries, plan.num_examples)
    guesses = _numbers_of_guesses(fractions, count)
    rows = np.sort(rng.choice(plan.num_examples, count, replace=False))
    if canaries is None:
        of_rows = keras.tree.map_structure(lambda part: part[rows], x)
        planted = (of_rows, _wrong_classes(y, rows, rng))
    else:
        planted = tuple(
            _checked_rows(f"canaries[{index}]", part, count) for index, part in enumerate(canaries)
        )
        planted = (_like(planted[0], x, "canaries[0]"), _like(planted[1], y, "canaries[1]"))
    included = rng.integers(0, 2, count).astype(bool)
    x, y = (_replaced(whole, part, rows) for whole, part in zip((x, y), planted, strict=True))
    weights = np.ones(plan.num_examples, np.float32)
    weights[rows] = included

    model = _checked_model(build_model(), plan)
    batches = plan.batches(x, y, sample_weight=weights)
    if not model.built:
        model(keras.tree.map_structure(lambda part: part[:1], x))
    if attack == "white-box":
        with recording(model, plan) as recorder:
            model.fit(batches, verbose=0, callbacks=[recorder])
            releases = recorder.releases()
            draws = plan.schedule.draws(model.optimizer.run_state.sampler_key)
            possible, groups = known_steps(plan, draws, rows)
            attacker = Attacker(model, plan, releases, x, y)
            # The others are known, and when they took part: no coin has a say in that.
            others = (np.setdiff1d(draws.indices(t), rows) for t in range(plan.num_steps))
            unknown = np.stack([attacker.without(t, each) for t, each in enumerate(others)])
            found = attacker.evidence(unknown, rows, possible)
        scores = log_likelihood_ratios(plan, found, groups)
    else:
        before = _losses(model, planted)
        model.fit(batches, verbose=0)
        scores = before - _losses(model, planted)
    return _report(plan, attack, scores, included, guesses, confidence)


def _checked_rows(name: str, data: Any, count: int) -> Any:
    """Returns a structure of arrays that have `count` rows each."""
    data = keras.tree.map_structure(np.asarray, data)
    leaves = keras.tree.flatten(data)
    shapes = [leaf.shape for leaf in leaves]
    if not leaves or any(not shape or shape[0] != count for shape in shapes):
        raise ValueError(
            f"Expected `{name}` to be arrays of {count} rows. Received: shapes {shapes}. Each row "
            "of the plan needs one, and so does each canary."
        )
    for leaf in leaves:
        if leaf.dtype.kind == "f" and not np.isfinite(leaf).all():
            raise ValueError(
                f"Expected `{name}` to be finite. Received: NaN or infinity. The gradient of such "
                "a row is left out, which would be found by no attack."
            )
    return data


def _number_of_canaries(num_canaries: int | None, canaries: Any, num_examples: int) -> int:
    if canaries is not None:
        if not isinstance(canaries, tuple) or len(canaries) != 2:
            raise TypeError(
                "Expected `canaries` to be a tuple (x, y). Received: "
                f"{type(canaries).__name__}. Leave it out for rows with wrong classes."
            )
        given = len(keras.tree.flatten(canaries[0])[0])
        if num_canaries not in (None, given):
            raise ValueError(
                "Expected `num_canaries` to be the number of the given canaries. Received: "
                f"num_canaries={num_canaries}, {given} canaries. Leave it out."
            )
        num_canaries = given
    if num_canaries is None:
        num_canaries = min(1_000, num_examples // 3)
    count = checked_int("num_canaries", num_canaries, 2)
    if count > num_examples:
        raise ValueError(
            f"Expected `num_canaries` to be at most the {num_examples} rows of the plan. Received: "
            f"num_canaries={count}. Each canary takes the place of a row."
        )
    return count


def _numbers_of_guesses(fractions: Sequence[float], count: int) -> list[int]:
    """Returns how many guesses are made, an even number for each fraction."""
    fractions = list(fractions)
    if not fractions:
        raise ValueError("Expected `fractions` to be numbers up to 1. Received: none.")
    for fraction in fractions:
        checked_float("fractions", fraction, above=0.0)
        if fraction > 1:
            raise ValueError(f"Expected `fractions` to be at most 1. Received: {fraction}.")
    return sorted({max(2, 2 * int(fraction * count / 2)) for fraction in fractions})


def _wrong_classes(y: Any, rows: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Returns targets of another class than the rows have, each equally likely."""
    hint = "Give the canaries yourself: canaries=(x, y)."
    if not isinstance(y, np.ndarray):
        raise ValueError(f"Expected `y` to be one array. Received: {type(y).__name__}. {hint}")
    if y.ndim == 2 and y.shape[1] > 1 and np.all((y == 0) | (y == 1)) and (y.sum(1) == 1).all():
        shift = rng.integers(1, y.shape[1], len(rows))
        classes = (np.argmax(y[rows], axis=1) + shift) % y.shape[1]
        return np.eye(y.shape[1], dtype=y.dtype)[classes]
    flat = y.reshape(len(y), -1)
    known = np.unique(flat) if flat.shape[1] == 1 and y.dtype.kind in "biuf" else ()
    if not 2 <= len(known) <= 10_000 or not np.array_equal(known, np.round(known)):
        raise ValueError(
            "Expected `y` to hold class numbers or one-hot rows, of at least two classes. "
            f"Received: y.shape={y.shape}, y.dtype={y.dtype}. {hint}"
        )
    own = np.searchsorted(known, flat[rows, 0])
    other = (own + rng.integers(1, len(known), len(rows))) % len(known)
    return known[other].reshape(y[rows].shape)


def _like(part: Any, whole: Any, name: str) -> Any:
    """Returns canaries in the dtypes of the data they join."""
    keras.tree.assert_same_structure(part, whole)

    def checked(a: np.ndarray, b: np.ndarray) -> np.ndarray:
        if a.shape[1:] != b.shape[1:]:
            raise ValueError(
                f"Expected `{name}` to have rows like the data, of shape {b.shape[1:]}. Received: "
                f"rows of shape {a.shape[1:]}."
            )
        return a.astype(b.dtype)

    return keras.tree.map_structure(checked, part, whole)


def _replaced(whole: Any, part: Any, rows: np.ndarray) -> Any:
    def one(a: np.ndarray, b: np.ndarray) -> np.ndarray:
        changed = a.copy()
        changed[rows] = b
        return changed

    return keras.tree.map_structure(one, whole, part)


def _checked_model(model: Any, plan: TrainingPlan) -> keras.Model:
    optimizer = private_training(model).optimizer
    if optimizer.plan != plan:
        raise ValueError(
            "Expected `build_model` to compile with a BandMFOptimizer of `plan`. Received: an "
            "optimizer of another plan."
        )
    if optimizer.steps_done:
        raise PrivacyError(
            "Expected `build_model` to return a model that was not trained yet. Received: an "
            f"optimizer at step {optimizer.steps_done}. Build a new model in each call."
        )
    return model


def _losses(model: keras.Model, canaries: tuple[Any, Any]) -> np.ndarray:
    """Returns the loss of each canary, by itself."""
    x, y = keras.tree.map_structure(tf.convert_to_tensor, canaries)
    build_loss(model, x, y)
    outputs = keras.tree.map_structure(tf.constant, model.predict(canaries[0], verbose=0))
    losses = per_example_losses(batch_loss(model), y, outputs, None).losses
    return losses.numpy().astype(np.float64)


def _report(
    plan: TrainingPlan,
    attack: str,
    scores: np.ndarray,
    included: np.ndarray,
    guesses: list[int],
    confidence: float,
) -> AuditReport:
    """Guesses the coins from the scores, and returns the best bound of all numbers of guesses."""
    scores = np.nan_to_num(scores, nan=0.0)  # of a run that diverged
    order = np.argsort(scores, kind="stable")
    share = 1.0 - (1.0 - confidence) / len(guesses)
    bounds = []
    for number in guesses:
        half = number // 2
        correct = int(included[order[-half:]].sum() + (~included[order[:half]]).sum())
        bound = one_run_lower_bound(correct, number, len(scores), plan.delta, share)
        bounds.append((bound, number, correct))
    bound, number, correct = max(bounds)
    share_in_words = "" if len(guesses) == 1 else f", the best of {len(guesses)} numbers of guesses"
    return AuditReport(
        kind="one run",
        attack=_IN_WORDS[attack],
        epsilon_lower_bound=bound,
        epsilon=plan.epsilon(),
        delta=plan.delta,
        confidence=confidence,
        scores_in=scores[included],
        scores_out=scores[~included],
        details=f"{correct} of {number} guesses were right, of {len(scores)} canaries"
        + share_in_words,
    )
