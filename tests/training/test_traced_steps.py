"""A step that is traced already takes no batch that the private fit did not announce."""

import keras
import numpy as np
import pytest

import keras_bandmf as bandmf
from tests import runs

DATA = runs.counting_data()
MODES = [({}, 1), ({"run_eagerly": True}, 1), ({"jit_compile": True}, 1), ({}, 2)]


def own_batches(replicas):
    """Batches of the form that the train function was traced for: nothing is traced anew."""
    data = runs.make_plan().batches(*DATA, seed=3).dataset(replicas)
    return data if replicas == 1 else runs.mirrored(replicas).experimental_distribute_dataset(data)


def call_train_function(model, replicas):
    """What a private fit left on the model."""
    model.train_function(iter(own_batches(replicas)))


def call_keras_fit(model, replicas):
    """Keras's own fit, one step."""
    data = runs.make_plan().batches(*DATA, seed=3).dataset(replicas)
    keras.Model.fit(model, data, steps_per_epoch=1, verbose=0)


# Keras's own fit cannot be had on replicas: it adds the bool masks of their batches.
CASES = [(call_train_function, *mode) for mode in MODES]
CASES += [(call_keras_fit, *mode) for mode in MODES if mode[1] == 1]


@pytest.mark.parametrize(("call", "options", "replicas"), CASES)
def test_a_traced_step_takes_no_batch_of_its_own_form(call, options, replicas):
    """A batch of another form is traced anew, and the check made in tracing would do."""
    plan = runs.make_plan()
    model = runs.compiled_in_scope(replicas, runs.counting_model, plan, **options)
    model.fit(plan.batches(*DATA), epochs=1, steps_per_epoch=1, verbose=0)
    before, steps = model.get_weights()[0], bandmf.statement(model).steps_run
    with pytest.raises(ValueError, match="not accounted"):
        call(model, replicas)
    np.testing.assert_array_equal(model.get_weights()[0], before)
    assert bandmf.statement(model).steps_run == steps


@pytest.mark.parametrize("jit_compile", [False, True])
def test_batches_of_other_sizes_are_not_traced_again(jit_compile):
    traced = []

    def loss(y_true, y_pred):
        traced.append(y_pred.shape)
        return runs.prediction_loss(y_true, y_pred)

    plan = runs.make_plan(num_bands=1, num_steps=16, batch_size=12, noise_multiplier=0.0)
    model = runs.compiled(runs.counting_model(), plan, loss=loss, jit_compile=jit_compile)
    batches = plan.batches(*runs.counting_data(), seed=2)
    model.fit(batches, epochs=1, verbose=0)
    before = len(traced)
    model.fit(batches, epochs=2, initial_epoch=1, verbose=0)
    sizes = [len(batches.batch(t, few_sizes=jit_compile)["mask"]) for t in range(16)]
    assert not set(sizes[8:]) <= set(sizes[:8])
    assert len(traced) == before
    drawn = np.concatenate([batches.indices(t) for t in range(16)])
    counts = np.bincount(drawn, minlength=96)
    np.testing.assert_allclose(-12.0 * model.get_weights()[0][:, 0], counts, atol=1e-5)
