"""Benchmarks: main() of the strategies' at tiny sizes, its programs run in this process."""

import contextlib
import importlib.util
import io
import pathlib
import re
import sys

import numpy as np
import pytest

from keras_bandmf.strategies import BandedStrategy, ToeplitzStrategy

PATH = pathlib.Path(__file__).parent.parent / "benchmarks" / "strategies.py"


@pytest.fixture
def benchmark(monkeypatch):
    spec = importlib.util.spec_from_file_location("strategies_benchmark", PATH)
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, module)  # its dataclass looks itself up there
    spec.loader.exec_module(module)

    def in_process(python, program, *numbers):
        if python == "peer":
            n, b, _ = numbers
            return {
                "seconds": [4.0, 2.0, 2.0] if program == module.PEER else 3.0,
                "mebibytes": 5.0,
                "coefficients": ToeplitzStrategy.square_root(n, b).coefficients.tolist(),
                "iteration": 1.0,
                "iterations": 100,
            } | ({"loss": 7.0} if program == module.PEER_BANDED else {})
        monkeypatch.setattr(sys, "argv", ["-c", *map(str, numbers)])
        with contextlib.redirect_stdout(io.StringIO()) as printed:
            exec(compile(module.MEMORY + program, "program", "exec"), {})
        return module.json.loads(printed.getvalue().splitlines()[-1])

    monkeypatch.setattr(module, "run", in_process)
    return module


def small(benchmark):
    return benchmark.Sizes(
        cold=((100, 2, 3.0),),
        warm=(100, 4),
        toeplitz=((40, 4),),
        banded=((40, 4),),
        whole=((40, 2, 20.0, 1024),),
        million=((50, 2, 20.0, 1024),),
        growth=(60, 120),
        iteration=((40, 4, 3),),
    )


def numbers_of(line):
    return [float(text) for text in re.findall(r"-?\d+(?:\.\d+)?(?:e[+-]?\d+)?", line)]


@pytest.mark.filterwarnings("ignore:The search was to end:RuntimeWarning")  # eight iterations
def test_everything_is_printed_beside_the_peer(benchmark, capsys):
    benchmark.main(["--peer_python", "peer", "--million"], small(benchmark))
    lines = capsys.readouterr().out.splitlines()
    toeplitz, banded = numbers_of(lines[1]), numbers_of(lines[2])
    theirs = ToeplitzStrategy.square_root(40, 4, column_normalize=False).loss()
    ours = ToeplitzStrategy.optimize(40, 4, column_normalize=False).loss()
    np.testing.assert_allclose(toeplitz[:4], [40, 4, ours, theirs], atol=1e-8)
    assert (toeplitz[5], toeplitz[7]) == (4.0, 5.0)
    np.testing.assert_allclose(
        banded[:4], [40, 4, BandedStrategy.optimize(40, 4).loss(), 7], atol=1e-8
    )
    text = "\n".join(lines)
    for wanted in ("n=5e+01 b=2, to convergence", "ns a step", "(linear: 1)", "times faster"):
        assert wanted in text
    assert text.count("target") == 8


@pytest.mark.filterwarnings("ignore:The search was to end:RuntimeWarning")
def test_without_a_peer_its_columns_are_empty(benchmark, capsys):
    benchmark.main([], small(benchmark))
    lines = capsys.readouterr().out.splitlines()
    assert lines[1].split()[4::2] == ["-"] * 3
    assert "peer not given" in "\n".join(lines)
