"""A model with an input called "mask", which is also the name of the mask in a plan's batch."""

import keras
import numpy as np
import pytest
import tensorflow as tf

import keras_bandmf as bandmf

N = 48
RNG = np.random.default_rng(0)
X = {
    "x": RNG.normal(size=(N, 3)).astype("float32"),
    "mask": RNG.normal(size=(N, 1)).astype("float32"),
}
Y = np.zeros((N, 1), "float32")
DECLARED = {"sampling": "fixed_order", "max_participations": 2, "min_separation": 6}
OWN_DATA = {
    "arrays": lambda plan: ((X, Y), {"batch_size": 8, "shuffle": False}),
    "dataset": lambda plan: ((tf.data.Dataset.from_tensor_slices((X, Y)).batch(8),), {}),
}


def compiled(**changes):
    plan = bandmf.TrainingPlan(
        num_examples=N,
        batch_size=8,
        epochs=2,
        num_bands=2,
        noise_multiplier=0.5,
        delta=1e-3,
        **changes,
    )
    inputs = {"x": keras.Input((3,), name="x"), "mask": keras.Input((1,), name="mask")}
    outputs = keras.layers.Dense(1)(keras.layers.Concatenate()(list(inputs.values())))
    model = bandmf.privatize(keras.Model(inputs, outputs))
    model.compile(optimizer=bandmf.BandMFOptimizer("sgd", plan, l2_norm_clip=1.0), loss="mse")
    return model, plan


@pytest.mark.parametrize("kind", list(OWN_DATA))
def test_data_of_the_users_own_is_not_taken_for_a_batch_of_the_plan(kind):
    model, plan = compiled(**DECLARED)
    data, options = OWN_DATA[kind](plan)
    model.fit(*data, epochs=1, verbose=0, **options)
    assert model.optimizer.steps_done == 6


def test_batches_of_the_plan_keep_their_mask_apart_from_the_input():
    model, plan = compiled()
    batches = plan.batches(X, Y)
    model.fit(batches, epochs=1, verbose=0)
    assert model.optimizer.steps_done == 6
    batch = batches.batch(0)
    assert batch["mask"].dtype == bool and batch["x"]["mask"].dtype == np.float32
