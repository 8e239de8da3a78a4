"""Forks after a private step, and says what the child may do. A process of its own: TensorFlow."""

import os
import sys

import keras_bandmf as bandmf
from tests import conftest, runs  # noqa: F401, the devices of a test process


def attempts(model, plan, noise):
    """What would draw noise in the child."""
    rows = [part[:8] for part in runs.counting_data()]
    gradients = bandmf.clipped_gradients(model, *rows)
    optimizer = model.optimizer

    def loop():
        with optimizer.accepting("test"):
            optimizer.apply_clipped(gradients, model.trainable_variables)

    return [
        lambda: model.fit(plan.batches(*runs.counting_data()), verbose=0, epochs=1),
        lambda: optimizer.check_ready(1),
        loop,
        noise.next,
        noise.check_process,
    ]


def main():
    """Exit status 0 if parent and child agree with the rule."""
    plan = runs.make_plan()
    model = runs.compiled(runs.counting_model(), plan, run_eagerly=True)
    model.fit(plan.batches(*runs.counting_data()), steps_per_epoch=1, verbose=0, epochs=1)
    noise = bandmf.noise.CorrelatedNoise(plan.strategy, 1.0, [(3,)])
    calls = attempts(model, plan, noise)
    child = os.fork()
    if child == 0:
        refused = 0
        for call in calls:
            try:
                call()
            except ValueError as error:
                refused += "fork" in str(error)
        os._exit(0 if refused == len(calls) else 1)
    _, status = os.waitpid(child, 0)
    for call in calls:
        call()
    return os.waitstatus_to_exitcode(status)


if __name__ == "__main__":
    sys.exit(main())
