"""Runs of plans that count groups as secret: noise, statement, JSON of the history."""

import keras
import numpy as np
import pytest

import keras_bandmf as bandmf
from keras_bandmf.optimizers.arguments import noise_stddev

RUN = {"num_examples": 400, "batch_size": 20, "num_steps": 24, "delta": 1e-4}


@pytest.fixture(scope="module")
def plan():
    return bandmf.TrainingPlan.calibrate(
        **RUN, num_bands=4, epsilon=2.0, amplification="secret_group"
    )


def trained(plan, epochs, jit_compile):
    random = np.random.default_rng(1)
    x, y = random.normal(size=(400, 3)).astype("float32"), random.normal(size=(400, 1))
    model = bandmf.privatize(keras.Sequential([keras.Input((3,)), keras.layers.Dense(1)]))
    optimizer = bandmf.BandMFOptimizer(keras.optimizers.SGD(0.1), plan, l2_norm_clip=1.0)
    model.compile(optimizer=optimizer, loss="mse", jit_compile=jit_compile)
    model.fit(plan.batches(x, y), epochs=epochs, steps_per_epoch=12, verbose=0)
    return model, optimizer


@pytest.mark.parametrize("jit_compile", [False, True])
def test_a_whole_run_states_the_certified_epsilon(plan, jit_compile):
    model, optimizer = trained(plan, 2, jit_compile)
    statement = bandmf.statement(model)
    assert statement.private and statement.epsilon == 2.0
    assert statement.accountant == "Monte Carlo (secret groups)"
    assert statement.other_accountants["known group"] > 2.0
    stddev = optimizer.run_state.noise.stddev
    assert plan.noise_stddev(1.0) < stddev < 1.05 * plan.noise_stddev(1.0)


def test_a_part_of_a_run_costs_no_more(plan):
    statement = bandmf.statement(trained(plan, 1, False)[0])
    assert statement.steps_charged == 12 and statement.private
    assert statement.epsilon <= 2.0


def test_the_noise_is_a_little_larger_than_with_groups_known(plan):
    same = bandmf.TrainingPlan(
        **RUN, strategy=plan.strategy, noise_multiplier=plan.noise_multiplier
    )
    mode, shapes = bandmf.clipping.FlatClipping(), [(1000, 1000)]
    arguments = mode, 1.0, shapes, False
    factor = noise_stddev(plan, *arguments) / noise_stddev(same, *arguments)
    assert 1.0 < factor < 1.0 + 1e-5
