"""Small plans and schedules of the planning tests."""

from keras_bandmf.accounting import Schedule
from keras_bandmf.plan import TrainingPlan


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
