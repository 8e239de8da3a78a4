"""A schedule of the learning rate may read the training loss: the statement says so."""

import keras

import keras_bandmf as bandmf
from tests import runs


def test_a_schedule_leaves_a_caveat_in_the_statement():
    """Keras passes it the epoch, but it can look at `model.history`: here at the training loss."""
    plan = runs.make_plan()
    model = runs.compiled(runs.counting_model(), plan, seed=None)

    def schedule(epoch, rate):
        losses = model.history.history.get("loss", [])
        return rate * 0.5 if losses and losses[-1] > 0.0 else rate

    scheduler = keras.callbacks.LearningRateScheduler(schedule)
    model.fit(plan.batches(*runs.counting_data()), epochs=2, callbacks=[scheduler], verbose=0)
    caveats = " ".join(bandmf.statement(model).caveats)
    assert "LearningRateScheduler" in caveats and "training metrics" in caveats
