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
