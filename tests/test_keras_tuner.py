"""A search with KerasTuner: refused without a ledger, and charged for all trials with one."""

import json

import keras
import numpy as np
import pytest

import keras_bandmf as bandmf

kt = pytest.importorskip("keras_tuner")

pytestmark = pytest.mark.filterwarnings("ignore:What is saved holds secrets")

_RANDOM = np.random.default_rng(0)
X = _RANDOM.normal(size=(96, 3)).astype("float32")
Y = (X[:, 0] > 0).astype("int32")
PLAN = bandmf.TrainingPlan(
    num_examples=64, batch_size=8, epochs=2, noise_multiplier=2.0, delta=1e-4, num_bands=2
)


def build(hp):
    model = bandmf.privatize(keras.Sequential([keras.Input((3,)), keras.layers.Dense(2)]))
    sgd = keras.optimizers.SGD(hp.Choice("learning_rate", [0.05, 0.1, 0.2, 0.4]))
    model.compile(
        bandmf.BandMFOptimizer(sgd, PLAN),
        loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        metrics=["accuracy"],
    )
    model.optimizer.build(model.trainable_variables)  # so that `get_best_models` can load
    return model


@pytest.fixture
def ledger(tmp_path):
    return bandmf.callbacks.PrivacyLedger(tmp_path / "ledger")


def tuner_of(tmp_path, kind=kt.RandomSearch, model=build, objective="val_accuracy", **options):
    options = {"max_trials": 2, "seed": 1} | options
    return kind(model, objective=objective, directory=tmp_path, project_name="search", **options)


def search(tuner, *callbacks, validation=(X[64:], Y[64:]), **options):
    given = {"callbacks": list(callbacks)} if callbacks else {}
    tuner.search(X[:64], Y[:64], validation_data=validation, verbose=0, **given, **options)
    return tuner


def test_the_ledger_composes_all_trials(tmp_path, ledger):
    tuner = search(tuner_of(tmp_path, executions_per_trial=2), ledger)
    whole = ledger.statement()
    assert [trial.status for trial in tuner.oracle.trials.values()] == ["COMPLETED"] * 2
    assert len(whole.runs) == 4 and whole.steps_charged == 4 * PLAN.num_steps
    assert whole.private and PLAN.epsilon() < whole.epsilon < 4 * PLAN.epsilon()
    (acted,) = [caveat for caveat in whole.caveats if "acted on validation data" in caveat]
    assert acted.startswith("KerasTuner(val_accuracy)")
    assert not any("callbacks of the user" in caveat for caveat in whole.caveats)


def test_the_best_model_says_that_its_epsilon_is_not_that_of_the_search(tmp_path, ledger):
    tuner = search(tuner_of(tmp_path), ledger)
    (model,) = tuner.get_best_models()
    statement = bandmf.statement(model)
    assert any("PrivacyLedger" in caveat for caveat in statement.caveats)
    assert not any("history unknown" in caveat for caveat in statement.caveats)
    assert statement.steps_charged == PLAN.num_steps
    assert statement.epsilon < ledger.statement().epsilon


def test_a_search_without_a_ledger_is_refused_before_the_first_step(tmp_path):
    """At the first trial, though KerasTuner goes on after other errors."""
    with pytest.raises(bandmf.PrivacyError, match=r"Received: a search without") as error:
        search(tuner_of(tmp_path))
    assert "PrivacyLedger(folder)" in str(error.value)
    assert "tuner.search(..., callbacks=[ledger])" in str(error.value)


@pytest.mark.parametrize(
    ("objective", "message"),
    [
        (kt.Objective("accuracy", "max"), "Received: objective='accuracy'"),
        ([kt.Objective("val_loss", "min"), kt.Objective("loss", "min")], "objective='loss'"),
    ],
    ids=["one", "several"],
)
def test_a_choice_by_a_training_metric_is_refused(tmp_path, ledger, objective, message):
    with pytest.raises(bandmf.PrivacyError, match=f"metric of validation data.*{message}"):
        search(tuner_of(tmp_path, objective=objective), ledger)
    with pytest.raises(ValueError, match="No private run"):
        ledger.statement()


def test_a_search_without_validation_data_is_refused(tmp_path, ledger):
    with pytest.raises(ValueError, match="'val_accuracy', which does not exist"):
        search(tuner_of(tmp_path), ledger, validation=None)


class FailsAtStep(keras.callbacks.Callback):
    def on_train_batch_end(self, batch, logs=None):
        if batch == 2:
            raise RuntimeError("out of memory")


def test_trials_that_fail_and_are_tried_again_count(tmp_path, ledger):
    """KerasTuner swallows the error. What was trained was trained."""
    tuner = tuner_of(tmp_path, max_trials=1, max_retries_per_trial=1)
    try:
        search(tuner, ledger, FailsAtStep())
    except RuntimeError:
        pass
    tries = ledger.statement().runs
    assert [(run.steps_run, run.steps_charged) for run in tries] == [(3, 16)] * 2


def test_a_search_that_goes_on_in_another_process_counts_on(tmp_path, ledger):
    search(tuner_of(tmp_path), ledger)
    again = bandmf.callbacks.PrivacyLedger(ledger.folder)
    tuner = search(tuner_of(tmp_path, max_trials=3, overwrite=False), again)
    assert len(tuner.oracle.trials) == 3
    assert len(ledger.statement().runs) == 3


class Returns(kt.HyperModel):
    """Chooses by what its `fit` returns."""

    def build(self, hp):
        return build(hp)

    def fit(self, hp, model, *args, **kwargs):
        return -model.fit(*args, **kwargs).history["val_loss"][-1]


def test_a_value_of_the_users_own_is_named_in_the_statement(tmp_path, ledger):
    search(tuner_of(tmp_path, model=Returns(), objective=None, max_trials=1), ledger)
    assert any("code of the user returned" in caveat for caveat in ledger.statement().caveats)


def test_hyperband_goes_on_with_runs_and_no_step_is_lost(tmp_path, ledger):
    tuner = kt.Hyperband(
        build,
        objective="val_loss",
        max_epochs=2,
        factor=2,
        seed=1,
        directory=tmp_path,
        project_name="search",
    )
    search(tuner, ledger)
    trials = tuner.oracle.trials.values()
    assert {trial.status for trial in trials} == {"COMPLETED"}
    went_on = [trial for trial in trials if "tuner/trial_id" in trial.hyperparameters.values]
    assert went_on
    whole = ledger.statement()
    # A run that went on holds the steps of the one before it.
    assert len(whole.runs) == len(trials) - len(went_on)


@pytest.mark.slow
def test_the_project_of_the_tuner_holds_no_statement(tmp_path, ledger):
    """`overwrite=True` deletes the project, and must not delete what the data has cost."""
    search(tuner_of(tmp_path), ledger)
    search(tuner_of(tmp_path, overwrite=True), ledger)
    assert len(ledger.statement().runs) == 4
    assert all(json.loads(file.read_text())["runs"] for file in ledger.folder.glob("*.json"))
