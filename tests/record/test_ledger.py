"""The ledger: every private run on the data is written down, and all are composed."""

import copy
import dataclasses

import keras
import numpy as np
import pytest

import keras_bandmf as bandmf
from keras_bandmf.accounting.composition import composed_epsilon, delta_of_ideal_noise
from keras_bandmf.record.ledger import ONE_OF_SEVERAL
from tests import runs

X, Y = runs.counting_data()
PLAN = runs.make_plan(num_steps=24)


def train(ledger=None, epochs=None, callbacks=(), model=None, plan=PLAN, **options):
    """A private run of two epochs of twelve steps; returns its model."""
    model = model or runs.compiled(runs.counting_model(), plan, **options)
    callbacks = [*callbacks, *([] if ledger is None else [ledger])]
    model.fit(plan.batches(X, Y), epochs=epochs, callbacks=callbacks, verbose=0)
    return model


class At(keras.callbacks.Callback):
    """Calls a function at the end of one step."""

    def __init__(self, step, function):
        super().__init__()
        self._step, self._function = step, function

    def on_train_batch_end(self, batch, logs=None):
        if batch == self._step:
            self._function()


def fail():
    raise RuntimeError("out of memory")


@pytest.fixture
def ledger(tmp_path):
    return bandmf.callbacks.PrivacyLedger(tmp_path / "of" / "my data")


@pytest.mark.parametrize("options", [{}, {"run_eagerly": True}, {"jit_compile": True}], ids=str)
def test_epsilon_is_that_of_all_runs_together(ledger, options):
    alone = [bandmf.statement(train(ledger, **options)) for _ in range(2)]
    both = ledger.statement()
    asked = delta_of_ideal_noise([1e-5, 1e-5], 1e-5)
    assert both.epsilon == composed_epsilon([*PLAN.statement().events] * 2, asked)[0]
    assert PLAN.epsilon() < both.epsilon < 2 * PLAN.epsilon()
    assert (both.steps_run, both.steps_charged) == (48, 48)
    assert [run.run_id for run in both.runs] == [run.run_id for run in alone]
    assert "2 runs on the same data" in str(both).replace("\n", " ")


def test_the_statement_of_one_run_says_that_it_is_not_all(ledger):
    model = train(ledger)
    assert ONE_OF_SEVERAL in bandmf.statement(model).caveats
    assert ONE_OF_SEVERAL not in ledger.statement().caveats
    train(ledger)
    assert "PrivacyLedger" not in str(ledger.statement())


def test_a_run_that_fails_is_charged_in_full(ledger):
    train(ledger)
    with pytest.raises(RuntimeError, match="out of memory"):
        train(ledger, callbacks=[At(2, fail)])
    _, failed = ledger.statement().runs
    assert (failed.steps_run, failed.steps_charged) == (3, 24)


def test_a_run_that_is_stopped_is_charged_in_full(ledger):
    train(ledger, callbacks=[bandmf.callbacks.StopAtEpsilon(PLAN.epsilon(13))])
    assert (ledger.statement().steps_run, ledger.statement().steps_charged) == (12, 24)


def test_fewer_steps_are_charged_if_that_was_asked_for(ledger):
    train(ledger, epochs=1)
    assert ledger.statement().steps_charged == 12


def test_a_run_that_is_killed_is_charged_in_full(ledger):
    """What the folder holds after the first step is what the next process finds."""
    seen = []
    train(ledger, callbacks=[At(0, lambda: seen.append(ledger.statement()))])
    assert seen[0].steps_charged == 24 and seen[0].epsilon == PLAN.epsilon()
    assert "callbacks of the user ran: At" in " ".join(seen[0].caveats)
    assert ledger.statement().steps_run == 24


def test_a_fit_that_made_no_step_is_not_charged(ledger):
    class Refuses(keras.callbacks.Callback):
        def on_train_begin(self, logs=None):
            fail()

    with pytest.raises(RuntimeError):
        train(ledger, callbacks=[Refuses()])
    with pytest.raises(ValueError, match=r"No private run.*callbacks=\[ledger\].*Received"):
        ledger.statement()


def test_a_later_fit_without_the_ledger_counts(ledger):
    model = train(ledger, epochs=1)
    train(model=model)
    assert ledger.statement().steps_run == 24


def test_a_run_that_others_may_go_on_with_is_charged_in_full(ledger):
    """A loop of the user's own makes steps without `fit`, if the plan declares participations."""
    plan = runs.make_plan(
        num_steps=24, sampling="fixed_order", max_participations=2, min_separation=12
    )
    train(ledger, epochs=1, plan=plan)
    assert ledger.statement().steps_charged == 24


def test_copies_and_other_processes_write_to_the_same_folder(ledger):
    train(ledger)
    train(copy.deepcopy(ledger))
    again = bandmf.callbacks.PrivacyLedger(str(ledger.folder))
    assert len(again.statement().runs) == 2
    assert again.statement() == ledger.statement()


def test_a_path_is_that_of_the_time_when_it_was_given(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    ledger = bandmf.callbacks.PrivacyLedger("ledger")
    monkeypatch.chdir("/")
    train(ledger)
    assert len(list((tmp_path / "ledger").glob("*.json"))) == 1


def test_files_hold_neither_keys_nor_data(ledger):
    model = train(ledger)
    (file,) = ledger.folder.iterdir()
    text, state = file.read_text(), model.optimizer.run_state
    keys = (state.sampler_key, state.noise.get_key(), state.get_mask_key())
    words = [int(word) for key in keys for word in np.asarray(key).ravel()]
    words = [word for word in words if abs(word) > 2**20]  # others are in any text
    assert words and not any(str(word) in text or f"{word:x}" in text for word in words)
    assert "events" in text


def test_an_earlier_run_on_the_weights_is_written_down_too(ledger):
    model = train()
    model.compile(bandmf.BandMFOptimizer("sgd", PLAN), loss=runs.prediction_loss)
    train(ledger, model=model)
    assert len(ledger.statement().runs) == 2
    assert ledger.statement().epsilon == bandmf.statement(model).epsilon


def test_a_run_restored_within_fit_is_one_run(ledger, tmp_path):
    """The entry that was made before the callback restored is gone, and no step counts twice."""

    def callbacks(*more):
        return [keras.callbacks.BackupAndRestore(tmp_path / "backup"), *more]

    with pytest.raises(RuntimeError):
        train(ledger, callbacks=callbacks(AtEpoch(1)))
    train(ledger, callbacks=callbacks())
    whole = ledger.statement()
    assert (whole.runs, whole.steps_run) == ((), 24)


class AtEpoch(keras.callbacks.Callback):
    """Fails when an epoch begins."""

    def __init__(self, epoch):
        super().__init__()
        self._epoch = epoch

    def on_epoch_begin(self, epoch, logs=None):
        if epoch == self._epoch:
            fail()


def test_what_is_learned_from_all_runs_goes_on_with_a_new_model(ledger):
    train(ledger)
    model = runs.compiled(runs.counting_model(), PLAN)
    bandmf.privatize(model, history=ledger.statement())
    train(ledger, model=model)
    assert bandmf.statement(model).epsilon == ledger.statement().epsilon > PLAN.epsilon()


def test_added_runs_count_once(ledger):
    one, other = train(ledger), train()
    ledger.add(bandmf.statement(other))
    ledger.add(bandmf.statement(one))
    ledger.add(bandmf.statement(other))
    assert len(ledger.statement().runs) == 2
    nameless = dataclasses.replace(bandmf.statement(other), run_id=None)
    ledger.add(nameless)
    ledger.add(nameless)
    assert len(ledger.statement().runs) == 4


def test_an_older_statement_takes_nothing_away(ledger):
    model = train(epochs=1)
    older = bandmf.statement(model)
    train(model=model)
    ledger.add(bandmf.statement(model))
    ledger.add(older)
    assert (ledger.statement().runs, ledger.statement().steps_charged) == ((), 24)


def test_steps_count_if_a_run_without_steps_is_restored_over_them(ledger, tmp_path):
    """The steps of the fit are those of no run that goes on, and were made."""
    other = runs.compiled(runs.counting_model(), PLAN)
    other.optimizer.build(other.trainable_variables)
    other.save_weights(tmp_path / "other.weights.h5")
    model = runs.compiled(runs.counting_model(), PLAN)
    restore = At(3, lambda: model.load_weights(tmp_path / "other.weights.h5"))
    with pytest.raises(bandmf.PrivacyError, match="restored state"):
        train(ledger, model=model, callbacks=[restore])
    assert ledger.statement().steps_charged == 24


def test_the_delta_may_be_chosen(ledger):
    train(ledger)
    train(ledger)
    assert ledger.statement(1e-4).epsilon < ledger.statement().epsilon


def test_a_fit_that_is_not_private_is_refused(ledger):
    model = keras.Sequential([keras.Input((3,)), keras.layers.Dense(1)])
    model.compile("sgd", loss="mse")
    with pytest.raises(bandmf.PrivacyError, match=r"privatize\(model\).*Received: the model"):
        model.fit(np.ones((1, 3)), np.ones((1, 1)), callbacks=[ledger], verbose=0)
    train(ledger)
    with pytest.raises(bandmf.PrivacyError, match="not private"):
        model.fit(np.ones((1, 3)), np.ones((1, 1)), callbacks=[ledger], verbose=0)


def test_wrong_arguments(ledger):
    with pytest.raises(TypeError, match=r"`folder`.*Received: folder=3"):
        bandmf.callbacks.PrivacyLedger(3)
    with pytest.raises(TypeError, match=r"`statement`.*Received: str"):
        ledger.add("a statement")
    train(ledger)
    (ledger.folder / "other.json").write_text("{}")
    with pytest.raises(ValueError, match=r"every .json file.*other.json"):
        ledger.statement()
