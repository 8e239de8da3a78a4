"""Several worker processes on this machine do what one device does; what goes wrong is loud."""

import numpy as np
import pytest
import scipy.stats

from keras_bandmf.clipping.coordinates import coordinates_of
from tests import runs, worker_job, workers


def results_of(job, folder, num_workers):
    """Runs a job that must succeed and returns what each worker saved."""
    codes, outputs = workers.run_job(job, folder, num_workers)
    assert codes == [0] * num_workers, outputs[np.argmax(np.array(codes) != 0)][-3000:]
    return [dict(np.load(folder / f"worker{index}.npz")) for index in range(num_workers)]


def check_weights_and_metrics(results):
    """They agree with one device to the order of float32 sums."""
    x, y = worker_job.regression_data()
    model = worker_job.regression_model()
    batches = worker_job.regression_plan().batches(x, y)
    history = model.fit(batches, epochs=2, verbose=0, validation_data=(x[:32], y[:32])).history
    whole_ring = model.optimizer.run_state.noise.state_bytes
    for result in results:
        for index, weight in enumerate(model.trainable_variables):
            np.testing.assert_allclose(result[f"train.weight{index}"], weight, atol=2e-5)
            np.testing.assert_array_equal(
                result[f"train.weight{index}"], results[0][f"train.weight{index}"]
            )
        for name, values in history.items():
            np.testing.assert_allclose(result[f"train.history_{name}"], values, rtol=1e-3)
        chunks = -(-4 // len(results))
        assert result["train.ring_bytes"] == whole_ring * chunks // 4


def check_rows(results):
    """Every worker makes the plan of one device from its rows, and trains to the same weights."""
    model = worker_job.planning_model()
    data = worker_job.regression_data()
    model.fit(*data, batch_size=8, epochs=2, validation_split=0.25, verbose=0)
    for result in results:
        assert str(result["rows.plan"]) == model.optimizer.plan.fingerprint
        for name, value in worker_job.weights_of(model).items():
            np.testing.assert_allclose(result[f"rows.{name}"], value, atol=1e-4)
            np.testing.assert_array_equal(result[f"rows.{name}"], results[0][f"rows.{name}"])


def check_carriers(results):
    """Every worker has the carriers, and takes the steps, of one device."""
    model = worker_job.carriers_model()
    batches = worker_job.carriers_plan().batches(*worker_job.regression_data())
    model.fit(batches, epochs=2, verbose=0)
    expected = worker_job.weights_of(model)
    expected |= coordinates_of(model.trainable_variables[0]).to_arrays()
    for result in results:
        for name, value in expected.items():
            np.testing.assert_allclose(result[f"carriers.{name}"], value, atol=1e-3)
            np.testing.assert_array_equal(
                result[f"carriers.{name}"], results[0][f"carriers.{name}"]
            )


def check_covariance(results):
    """Chi-square over all pairs of 64 steps in a compiled `fit`; false-alarm rate 1e-4."""
    updates = results[0]["covariance.updates"]
    assert updates.shape == (64, 2000)
    plan = worker_job.covariance_plan()
    statistic, degrees = runs.whitened_statistic(plan, updates)
    assert statistic < scipy.stats.chi2.isf(1e-4, degrees)
    np.testing.assert_array_equal(updates, results[-1]["covariance.updates"])


def check_keras_needs_the_workarounds(results):
    """If this fails, remove the workaround in `keras_faults.py`."""
    assert "PerReplica" in str(results[0]["keras_alone.symbolic_build"])
    assert "Invalid reduction dimension 0" in str(results[0]["keras_alone.scalar_logs"])


def check_refusals(results):
    """The chief refuses too: it must not wait for a worker that gave up."""
    for result in results:
        assert "are not running the same job" in str(result["refusals.other_rows"])
        assert "plan.batches" in str(result["refusals.arrays"])


def check_a_saved_run_goes_on_on_one_device(folder):
    """The file depends neither on the number of replicas nor on the worker."""
    data = runs.counting_data()
    plan = worker_job.crash_plan()
    expected = runs.fit(worker_job.crash_model(), plan.batches(*data), epochs=worker_job.EPOCHS)
    for worker in range(2):
        model = worker_job.crash_model()
        model.load_weights(folder / f"worker{worker}.weights.h5")
        updates = runs.fit(model, plan.batches(*data), epochs=1)
        np.testing.assert_allclose(updates, expected[9:21], atol=1e-5)


@pytest.mark.slow
def test_two_workers_do_what_one_device_does(tmp_path):
    """One job for all checks: the processes take longer to start than to train."""
    results = results_of("together", tmp_path, 2)
    check_weights_and_metrics(results)
    check_rows(results)
    check_carriers(results)
    check_covariance(results)
    check_keras_needs_the_workarounds(results)
    check_refusals(results)
    check_a_saved_run_goes_on_on_one_device(tmp_path)


@pytest.mark.slow
def test_three_workers_do_what_one_device_does(tmp_path):
    """Three does not divide the four chunks of weights."""
    results = results_of("three", tmp_path, 3)
    check_weights_and_metrics(results)
    check_covariance(results)


@pytest.mark.slow
def test_a_worker_that_dies_stops_the_job_and_a_restart_finishes_it(tmp_path):
    """Killed in the third epoch of four, all restart from the backup of the second."""
    codes, outputs = workers.run_job("dies", tmp_path)
    assert codes[0] != 0 and "task:1" in outputs[0]
    assert not (tmp_path / "worker0.npz").exists()
    results = results_of("resumed", tmp_path, 2)
    model = worker_job.crash_model()
    model.fit(
        worker_job.crash_plan().batches(*runs.counting_data()),
        epochs=worker_job.EPOCHS,
        verbose=0,
    )
    for result in results:
        assert (result["resumed.steps"], result["resumed.restores"]) == (48, 1)
        np.testing.assert_allclose(result["resumed.weights"], model.get_weights()[0], atol=2e-5)
