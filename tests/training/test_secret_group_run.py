"""Runs of plans that count groups as secret: noise, statement, JSON of the history."""

import keras
import numpy as np
import pytest

import keras_bandmf as bandmf
from keras_bandmf.optimizers.arguments import noise_stddev

RUN = {"num_examples": 400, "batch_size": 20, "num_steps": 24, "delta": 1e-4}


LAWS = {
    "cyclic_poisson": {},
    # 2 of 6 rounds; the expected batch is 400 * 2 / 24 and not 20.
    "random_allocation": {"max_participations": 2},
}


@pytest.fixture(scope="module", params=list(LAWS))
def plan(request):
    return bandmf.TrainingPlan.calibrate(
        **RUN,
        **LAWS[request.param],
        num_bands=4,
        epsilon=2.0,
        sampling=request.param,
        amplification="secret_group",
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
    assert all(epsilon > 2.0 for epsilon in statement.other_accountants.values())
    assert len(statement.other_accountants) == 1
    stddev = optimizer.run_state.noise.stddev
    assert plan.noise_stddev(1.0) < stddev < 1.05 * plan.noise_stddev(1.0)


def test_a_part_of_a_run_costs_no_more(plan):
    statement = bandmf.statement(trained(plan, 1, False)[0])
    assert statement.steps_charged == 12 and statement.private
    assert statement.epsilon <= 2.0


def test_the_noise_is_a_little_larger_than_with_groups_known(plan):
    same = bandmf.TrainingPlan(
        **RUN,
        **LAWS[plan.sampling],
        sampling=plan.sampling,
        strategy=plan.strategy,
        noise_multiplier=plan.noise_multiplier,
    )
    mode, shapes = bandmf.clipping.FlatClipping(), [(1000, 1000)]
    arguments = mode, 1.0, shapes, False
    factor = noise_stddev(plan, *arguments) / noise_stddev(same, *arguments)
    assert 1.0 < factor < 1.0 + 1e-5


def test_the_sum_is_divided_by_the_examples_that_are_expected(plan):
    _, optimizer = trained(plan, 1, False)
    assert optimizer.plan.schedule.expected_batch_size == pytest.approx(
        20 if plan.sampling == "cyclic_poisson" else 400 * 2 / 24
    )
    zero = bandmf.TrainingPlan(
        **RUN, **LAWS[plan.sampling], sampling=plan.sampling, num_bands=4, noise_multiplier=0.0
    )
    x = np.ones((400, 3), "float32")
    model = bandmf.privatize(keras.Sequential([keras.Input((3,)), Constant()]))
    optimizer = bandmf.BandMFOptimizer(keras.optimizers.SGD(1.0), zero, l2_norm_clip=1e6)
    model.compile(optimizer=optimizer, loss=lambda y, prediction: prediction)
    batches = zero.batches(x, np.zeros(400))
    model.fit(batches, epochs=1, steps_per_epoch=1, verbose=0)
    drawn = len(batches.indices(0))
    moved = -float(model.trainable_weights[0].numpy()[0])
    assert moved == pytest.approx(drawn / zero.schedule.expected_batch_size, rel=1e-5)


@keras.saving.register_keras_serializable("tests")
class Constant(keras.layers.Layer):
    """One weight for all examples: its gradient is 1 for each."""

    def build(self, shape):
        self.weight = self.add_weight(shape=(1,), initializer="zeros")

    def call(self, inputs):
        return inputs[:, :1] * self.weight
