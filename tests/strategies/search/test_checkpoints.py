"""Searches that are kept on disk: resumed to the same bits, found again, never confused."""

import math

import numpy as np
import pytest

from keras_bandmf.strategies import BandedStrategy, Workload

N, B = 60, 4


class Stopped(Exception):
    """Stands for whatever ends a process."""


def optimize(tmp_path=None, stop_after=None, num_steps=N, **arguments):
    """A search that is perhaps kept in `tmp_path` or stopped; returns it and its iterations."""
    seen = []

    def callback(progress):
        seen.append(progress.iteration)
        if len(seen) == stop_after:
            raise Stopped

    arguments = {"cache_dir": tmp_path, "checkpoint_seconds": 0, **arguments}
    try:
        found = BandedStrategy.optimize(num_steps, B, callback=callback, **arguments)
    except Stopped:
        found = None
    return found, seen


def kinds(tmp_path):
    return sorted(path.suffix for path in tmp_path.iterdir())


@pytest.mark.parametrize("error", ["mean", "max"])
def test_a_resumed_search_ends_with_the_same_bits(tmp_path, error):
    whole, iterations = optimize(error=error)
    third = len(iterations) // 3
    stops = [1, 2, third, third]  # for "max", in several of its stages
    for stop in stops:
        optimize(tmp_path, stop, error=error)
        assert kinds(tmp_path) == [".checkpoint"]
    found, last = optimize(tmp_path, error=error)
    assert last == iterations[sum(stops) :]
    assert found == whole
    assert kinds(tmp_path) == [".result"]


def test_more_iterations_go_on_from_where_fewer_ended(tmp_path):
    with pytest.warns(RuntimeWarning, match="an estimate from the quadratic model"):
        part, _ = optimize(tmp_path, max_iterations=5)
    with pytest.warns(RuntimeWarning):
        again, seen = optimize(tmp_path, max_iterations=5)
    assert again == part and not seen
    found, seen = optimize(tmp_path)
    assert seen[0] == 6 and found == optimize()[0]


def test_a_result_is_found_again_without_a_search(tmp_path):
    first, seen = optimize(tmp_path)
    again, none = optimize(tmp_path, max_iterations=1)
    assert seen and not none
    assert again == first == optimize()[0]


def test_checkpoints_keep_their_distance(tmp_path):
    optimize(tmp_path, 5, checkpoint_seconds=3600.0)
    assert kinds(tmp_path) == []


def test_nothing_is_written_by_default(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    BandedStrategy.optimize(N, B)
    assert kinds(tmp_path) == []


@pytest.mark.parametrize("kind", ["result", "checkpoint"])
@pytest.mark.parametrize("damage", [lambda b: b[:-9], lambda b: b[:-50] + b"\x01" + b[-49:]])
def test_damaged_files_are_done_again(tmp_path, kind, damage):
    whole, iterations = optimize()
    optimize(tmp_path, 5 if kind == "checkpoint" else None)
    (path,) = tmp_path.iterdir()
    path.write_bytes(damage(path.read_bytes()))
    with pytest.warns(RuntimeWarning, match="cut short, damaged or was edited"):
        found, seen = optimize(tmp_path)
    assert found == whole and seen == iterations
    assert optimize(tmp_path)[1] == [] and kinds(tmp_path) == [".result"]


def test_other_requests_are_not_confused(tmp_path):
    # Starts are given, as the search for the best Toeplitz strategy takes longer than all else.
    def start(num_steps=N, second=0.5):
        return BandedStrategy(np.tile([1.0, second, 0.0, 0.0], (num_steps, 1)))

    requests = [
        {"start": start()},
        {"start": start(N + 1), "num_steps": N + 1},
        {"start": start(second=0.6)},
        {"start": start(), "error": "max"},
        {"start": start(), "gain": 1e-7},
        {"start": start(), "workload": Workload(N, momentum=0.5)},
        {"start": start(), "workload": Workload(N, learning_rates=np.linspace(1.0, 2.0, N))},
    ]
    for i, request in enumerate(requests):
        found, seen = optimize(tmp_path, **request)
        assert seen[0] == 1 and kinds(tmp_path) == [".result"] * (i + 1)
        again, none = optimize(tmp_path, **request)
        assert again == found and again.workload == request.get("workload") and not none


@pytest.mark.parametrize(
    "argument", [{"cache_dir": 3}, {"checkpoint_seconds": -1}, {"checkpoint_seconds": None}]
)
def test_bad_arguments(argument):
    (name,) = argument
    with pytest.raises((TypeError, ValueError), match=f"`{name}`.*Received: {name}="):
        BandedStrategy.optimize(N, B, **argument)


def test_an_infinite_time_between_checkpoints_is_none(tmp_path):
    found = BandedStrategy.optimize(N, B, cache_dir=tmp_path, checkpoint_seconds=math.inf)
    assert found == BandedStrategy.optimize(N, B)
