"""Steps of jax-privacy on the same Keras models, for `clipping.py`; all of them compiled.

For an environment with `jax-privacy`, `keras` and `keras-hub`. "core" is its `clipped_grad` of a
pure loss function, without noise, and the update. Its Keras API always adds noise: that step is
"with noise"; "clipped" is the call for clipped gradients that the API makes, and no noise.
"""

from __future__ import annotations

import os
import sys

os.environ["KERAS_BACKEND"] = "jax"

import clipping_models as models
import jax
import jax_privacy
from clipping_measure import Sizes, Step, answer, data
from jax_privacy import keras_api


def _prepared(name: str, batch: int, sizes: Sizes) -> tuple:
    model = models.compiled(name, sizes)
    x, y = jax.tree.map(jax.numpy.asarray, data(name, batch, sizes))
    return model, x, y


def _state(model) -> tuple[list, list, list, list]:
    groups = (
        model.trainable_variables,
        model.non_trainable_variables,
        model.optimizer.variables,
        model.metrics_variables,
    )
    # Copies, since the steps give their arguments' memory back.
    return tuple([v.value.copy() for v in group] for group in groups)


def _repeated(train_step, state, x, y) -> Step:
    step = jax.jit(train_step, donate_argnums=0)
    held = [state]

    def run():
        logs, held[0] = step(held[0], (x, y))
        return float(logs["loss"])

    return run


def plain(name: str, batch: int, sizes: Sizes) -> Step:
    """Keras's own training step."""
    model, x, y = _prepared(name, batch, sizes)
    model._symbolic_build(data_batch=(x, y))
    return _repeated(model.train_step, _state(model), x, y)


def with_noise(name: str, batch: int, sizes: Sizes) -> Step:
    """The training step after `make_private`."""
    model, x, y = _prepared(name, batch, sizes)
    params = keras_api.DPKerasConfig(
        epsilon=100.0,
        delta=1e-6,
        clipping_norm=1.0,
        batch_size=batch,
        gradient_accumulation_steps=1,
        train_steps=100,
        train_size=100 * batch,
        noise_multiplier=1.0,
        rescale_to_unit_norm=False,
        seed=0,
    )
    model._symbolic_build(data_batch=(x, y))
    model = keras_api.make_private(model, params)
    return _repeated(model.train_step, _state(model), x, y)


def clipped(name: str, batch: int, sizes: Sizes) -> Step:
    """Clipped gradients as the Keras API asks for them, and the update."""
    model, x, y = _prepared(name, batch, sizes)
    model._symbolic_build(data_batch=(x, y))
    gradients = jax_privacy.clipped_grad(
        fun=model.compute_loss_and_updates,
        has_aux=True,
        return_values=True,
        l2_clip_norm=1.0,
        rescale_to_unit_norm=False,
        normalize_by=batch,
        batch_argnums=(3, 4, 5),
    )

    def train_step(state, data):
        weights, others, slots, metrics = state
        found, aux = gradients(weights, others, metrics, *data, None, True, slots)
        weights, slots = model.optimizer.stateless_apply(slots, found, weights)
        return {"loss": aux.values.mean()}, (weights, others, slots, metrics)

    return _repeated(train_step, _state(model), x, y)


def core(name: str, batch: int, sizes: Sizes) -> Step:
    """Clipped gradients of a pure function of weights and data, and the update."""
    model, x, y = _prepared(name, batch, sizes)
    model._symbolic_build(data_batch=(x, y))
    weights, others, slots, metrics = _state(model)

    def loss(weights, x, y):
        outputs, _ = model.stateless_call(weights, others, x, training=True)
        return model.loss(y, outputs)

    gradients = jax_privacy.clipped_grad(
        loss, l2_clip_norm=1.0, batch_argnums=(1, 2), normalize_by=batch, return_values=True
    )

    def train_step(state, data):
        weights, slots = state
        found, aux = gradients(weights, *data)
        weights, slots = model.optimizer.stateless_apply(slots, found, weights)
        return {"loss": aux.values.mean()}, (weights, slots)

    return _repeated(train_step, (weights, slots), x, y)


STEPS = {"plain": plain, "core": core, "clipped": clipped, "with noise": with_noise}

if __name__ == "__main__":
    answer(STEPS, sys.argv[1])
