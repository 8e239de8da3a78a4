"""Small plans, schedules and workloads of the planning tests."""

import numpy as np

from keras_bandmf.planning.plan import TrainingPlan
from keras_bandmf.sampling.schedule import Schedule


def make_plan(**changes):
    """A plan of 3 epochs, 60 steps, and 4 bands."""
    arguments = {
        "num_examples": 1_000,
        "batch_size": 50,
        "epochs": 3,
        "noise_multiplier": 1.5,
        "delta": 1e-5,
        "num_bands": 4,
    }
    return TrainingPlan(**(arguments | changes))


def make_schedule(**changes):
    """A schedule of 10 epochs, 1,000 steps, and 4 bands."""
    arguments = {
        "sampling": "cyclic_poisson",
        "num_examples": 60_000,
        "batch_size": 600,
        "num_steps": 1_000,
        "num_bands": 4,
    }
    return Schedule(**(arguments | changes))


def dense_workload(workload):
    """A, row by row from its definition, without the package's own blocks."""
    n = workload.num_steps
    rates = np.broadcast_to(workload.learning_rates, n)
    velocity, weights, rows = np.zeros(n), np.zeros(n), []
    for i in range(n):
        impulse = rates[i] * np.eye(n)[i]
        velocity = workload.momentum * velocity + impulse
        step = workload.momentum * velocity + impulse if workload.nesterov else velocity
        weights = (1 - workload.weight_decay * rates[i]) * weights + step
        rows.append(weights)
    return np.array(rows)
