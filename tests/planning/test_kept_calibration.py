"""Calibrations with a certificate are kept in files, and only true ones are read back."""

import json
import pathlib
import struct
import warnings

import pytest

import keras_bandmf as bandmf
from keras_bandmf.planning import calibration, kept_calibration
from keras_bandmf.planning.arguments import PlanArguments
from keras_bandmf.planning.kept_calibration import Kept, KeptCalibration
from keras_bandmf.planning.progress import CalibrationProgress, ProgressBar
from keras_bandmf.strategies import BandedStrategy

RUN = {
    "num_examples": 400,
    "batch_size": 20,
    "num_steps": 24,
    "num_bands": 4,
    "epsilon": 2.0,
    "delta": 1e-4,
    "amplification": "secret_group",
}


@pytest.fixture(scope="module")
def kept(tmp_path_factory):
    """(the plan, what the callback was told, the directory)."""
    directory, told = tmp_path_factory.mktemp("kept"), []
    plan = bandmf.TrainingPlan.calibrate(**RUN, cache_dir=directory, callback=told.append)
    return plan, told, directory


@pytest.fixture
def no_samples(monkeypatch):
    """Calibrating anew is an error."""

    def anew(*arguments, **named):
        raise AssertionError("calibrated anew")

    monkeypatch.setattr(calibration, "calibrated_run", anew)


def copied(directory, tmp_path):
    (path,) = pathlib.Path(directory).iterdir()
    copy = tmp_path / path.name
    copy.write_bytes(path.read_bytes())
    return copy


def test_the_same_request_draws_no_samples(kept, no_samples):
    plan, _, directory = kept
    told = []
    again = bandmf.TrainingPlan.calibrate(**RUN, cache_dir=str(directory), callback=told.append)
    assert again == plan and again.certificate == plan.certificate
    assert again.epsilon() == plan.epsilon() == 2.0
    assert not told


@pytest.mark.parametrize(
    "change",
    [
        {"num_examples": 401},
        {"batch_size": 19},
        {"num_steps": 25},
        {"num_bands": 5},
        {"epsilon": 2.1},
        {"delta": 2e-4},
        {"max_bands": 5},
        {"amplification": "known_group"},
        {"strategy": "banded"},
        {"workload": bandmf.strategies.Workload(24, momentum=0.9)},
    ],
    ids=str,
)
def test_another_request_is_not_answered(kept, no_samples, change):
    with pytest.raises(AssertionError, match="anew"):
        bandmf.TrainingPlan.calibrate(**RUN | change, cache_dir=kept[2])


def test_another_version_of_the_algorithm_is_not_answered(kept, no_samples, monkeypatch):
    monkeypatch.setattr(kept_calibration, "_VERSION", 0)
    with pytest.raises(AssertionError, match="anew"):
        bandmf.TrainingPlan.calibrate(**RUN, cache_dir=kept[2])


@pytest.mark.parametrize("damage", ["cut", "flipped", "foreign"])
def test_a_damaged_file_is_reported_and_not_used(kept, tmp_path, no_samples, damage):
    path = copied(kept[2], tmp_path)
    content = bytearray(path.read_bytes())
    if damage == "cut":
        content = content[:-7]
    elif damage == "flipped":
        content[len(content) // 2] ^= 1
    else:
        content = bytearray(struct.pack("<4d", 1.0, 2.0, 3.0, 4.0))
    path.write_bytes(content)
    with (
        pytest.warns(RuntimeWarning, match="not used"),
        pytest.raises(AssertionError, match="anew"),
    ):
        bandmf.TrainingPlan.calibrate(**RUN, cache_dir=tmp_path)


def keeper(directory):
    arguments = PlanArguments.resolve(
        num_examples=400,
        batch_size=20,
        num_steps=24,
        epochs=None,
        num_bands=4,
        strategy="toeplitz",
        workload=None,
        max_participations=None,
        min_separation=None,
    )
    return KeptCalibration(
        directory,
        arguments,
        epsilon=2.0,
        delta=1e-4,
        sampling="cyclic_poisson",
        max_bands=128,
        amplification="secret_group",
    )


@pytest.mark.parametrize(
    "change",
    [
        {"epsilon": 3.0},
        {"delta": 5e-4},
        {"delta": 5e-5},
        {"bound": 5e-4},
        {"samples": 7},
        {"more": 1},
    ],
    ids=str,
)
def test_a_false_certificate_is_not_used(kept, tmp_path, change):
    plan, _, _ = kept
    config = plan.certificate.get_config() | change

    class Written:
        def get_config(self):
            return config

    keeper(tmp_path).save(Kept(plan.schedule, plan.strategy, Written()))
    assert keeper(tmp_path).load() is None
    keeper(tmp_path).save(Kept(plan.schedule, plan.strategy, plan.certificate))
    assert keeper(tmp_path).load().certificate == plan.certificate


def test_a_strategy_of_other_steps_is_not_used(kept, tmp_path):
    plan, _, _ = kept
    other = bandmf.strategies.ToeplitzStrategy.optimize(25, 4)
    keeper(tmp_path).save(Kept(plan.schedule, other, plan.certificate))
    assert keeper(tmp_path).load() is None


def test_large_strategies_are_kept_to_the_last_bit(kept, tmp_path):
    plan, _, _ = kept
    strategy = BandedStrategy.optimize(24, 4)
    keeper(tmp_path).save(Kept(plan.schedule, strategy, plan.certificate))
    assert json.dumps(keeper(tmp_path).load().strategy.get_config()) == json.dumps(
        strategy.get_config()
    )


def test_runs_of_known_groups_are_not_kept(tmp_path):
    run = RUN | {"amplification": "known_group"}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        bandmf.TrainingPlan.calibrate(**run, cache_dir=tmp_path / "new")
    assert not list((tmp_path / "new").iterdir())


def test_the_callback_is_told_of_all_samples(kept):
    _, told, _ = kept
    stages = [progress.stage for progress in told]
    assert list(dict.fromkeys(stages)) == ["compare", "certify", "done"]
    assert stages.count("done") == 1
    samples = [progress.samples for progress in told]
    assert samples == sorted(samples) and samples[0] > 0
    assert {progress.num_bands for progress in told} == {4}


def test_a_bar_shows_the_samples_and_ends(capsys):
    bar = ProgressBar()
    for _ in range(2):
        bar(CalibrationProgress("compare", 11, 100))
        bar(CalibrationProgress("certify", 17, 300))
        bar(CalibrationProgress("done", 17, 300))
        shown = capsys.readouterr().out
        assert "300/Unknown" in shown and "bands: 17" in shown and shown.endswith("\n")
    silent = ProgressBar(verbose=0)
    silent(CalibrationProgress("compare", 11, 100))
    assert not capsys.readouterr().out


@pytest.mark.parametrize("bad", [{"callback": 3}, {"cache_dir": 3}])
def test_what_is_no_callback_and_no_directory_is_refused(bad):
    with pytest.raises(TypeError, match=f"{next(iter(bad))}.*Received"):
        bandmf.TrainingPlan.calibrate(**RUN, **bad)
