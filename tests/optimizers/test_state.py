"""The secret state of a run: what is saved, what a restore draws anew and what it keeps."""

import numpy as np
import pytest

from keras_bandmf import _distribution
from keras_bandmf.optimizers.state import RunState
from tests import runs


def state(seed=None, shapes=((3,), (2, 5))):
    """The state of a run of 24 steps and four bands."""
    return RunState(runs.make_plan().strategy, 1.0, shapes, "ab" * 32, seed)


def test_going_back_in_the_same_process_draws_a_new_noise_key():
    """The steps are made again on other gradients: the same noise on both would cancel."""
    run = state()
    arrays, key = run.to_arrays(), run.noise.get_key()
    run.from_arrays(arrays, replay=False)
    assert not np.array_equal(run.noise.get_key(), key)


def test_the_noise_key_of_a_replaying_run_is_dropped_without_replay():
    saved = state()
    run = state()
    run.from_arrays(saved.to_arrays(replay=True), replay=False)
    assert not np.array_equal(run.noise.get_key(), saved.noise.get_key())
    assert not run.replayed and run.restores == 1


def test_a_restore_keeps_ring_position_sampler_key_digest_and_provenance():
    saved = state(seed=1)
    ring = np.random.default_rng(0).integers(-(2**31), 2**31, (3, 13), dtype=np.int32)
    saved.noise.set_ring(ring)
    saved.noise.position = 7
    saved.accept_data(b"rows", seeded=False)
    run = state()
    run.from_arrays(saved.to_arrays(), replay=False)
    np.testing.assert_array_equal(run.noise.get_ring(), ring)
    np.testing.assert_array_equal(run.sampler_key, saved.sampler_key)
    assert run.noise.position == 7 and run.seeded
    with pytest.raises(ValueError, match="order of the rows"):
        run.accept_data(b"others", seeded=False)


@pytest.mark.parametrize(("seed", "of_batches"), [(1, False), (None, True)])
def test_a_fixed_seed_of_noise_or_batches_is_remembered(seed, of_batches):
    run = state(seed)
    run.accept_data(b"rows", seeded=of_batches)
    run.accept_data(b"rows", seeded=False)
    assert run.seeded


@pytest.mark.parametrize("position", [-1, 25])
def test_a_position_outside_the_run_is_refused(position):
    run = state()
    arrays = run.to_arrays() | {"position": np.array(position, np.int64)}
    with pytest.raises(ValueError, match="position"):
        run.from_arrays(arrays, replay=False)


def test_replay_needs_the_noise_key():
    run = state()
    with pytest.raises(ValueError, match="without the noise key"):
        run.from_arrays(state().to_arrays(), replay=True)


def test_a_finished_run_keeps_no_noise_key_even_if_it_may_replay():
    run = state()
    run.noise.position = 24
    assert run.to_arrays(replay=True)["noise_key"].size == 0


def test_a_state_of_the_format_with_a_float_ring_is_refused():
    arrays = state().to_arrays() | {
        "format": np.array(1, np.int32),
        "noise_ring": np.zeros((3, 13), np.float32),
    }
    with pytest.raises(ValueError, match="Use the version of keras_bandmf that wrote it"):
        state().from_arrays(arrays, replay=False)


def test_a_refused_restore_leaves_position_and_keys_alone():
    run = state()
    arrays = run.to_arrays() | {
        "noise_ring": np.zeros((2, 13), np.int32),
        "position": np.array(5, np.int64),
    }
    sampler_key, noise_key = run.sampler_key.copy(), run.noise.get_key()
    with pytest.raises(ValueError, match="noise ring"):
        run.from_arrays(arrays, replay=False)
    assert run.noise.position == 0 and run.restores == 0
    np.testing.assert_array_equal(run.sampler_key, sampler_key)
    np.testing.assert_array_equal(run.noise.get_key(), noise_key)


def _restored(run):
    run.from_arrays(run.to_arrays(replay=True), replay=False)


def _replayed(run):
    run.from_arrays(run.to_arrays(replay=True), replay=True)
    run.restores = 0


WORKER_DIFFERENCES = {
    "fingerprint": lambda run: setattr(run, "fingerprint", "cd" * 32),
    "data": lambda run: run.accept_data(b"other rows", seeded=False),
    "position": lambda run: setattr(run.noise, "position", 3),
    "seed": lambda run: setattr(run, "seeded", False),
    "sampler key": lambda run: setattr(run, "sampler_key", run.sampler_key + np.uint64(1)),
    "restore": _restored,
    "replay": _replayed,
}


@pytest.mark.parametrize("difference", [None, *WORKER_DIFFERENCES])
def test_worker_processes_must_agree_on_everything_but_the_noise_key(difference, monkeypatch):
    """The chief's noise key is that of all; one worker that was restored alone is another run."""
    said = []

    def same_everywhere(strategy, content):
        said.append(content)
        return len(set(said)) == 1

    monkeypatch.setattr(_distribution, "same_everywhere", same_everywhere)
    chief, worker = state(seed=1), state(seed=1)
    worker.noise.set_key(worker.noise.get_key() + np.uint64(1))
    chief.check_workers()
    if difference is None:
        worker.check_workers()
        return
    WORKER_DIFFERENCES[difference](worker)
    with pytest.raises(ValueError, match="are not running the same job"):
        worker.check_workers()


def test_a_finished_run_keeps_no_row_of_its_noise():
    """The file of a trained model is the one that is shared: no later row needs the ring."""
    run = state(seed=1)
    for _ in range(run.noise.num_steps):
        run.noise.next()
    assert np.any(run.noise.get_ring())
    for replay in (False, True):
        arrays = run.to_arrays(replay=replay)
        assert not np.any(arrays["noise_ring"])
    again = state()
    again.from_arrays(arrays, replay=False)
    assert again.noise.position == again.noise.num_steps
