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


@pytest.mark.filterwarnings("ignore:The search ended after:RuntimeWarning")  # eight iterations
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


@pytest.mark.filterwarnings("ignore:The search ended after:RuntimeWarning")
def test_without_a_peer_its_columns_are_empty(benchmark, capsys):
    benchmark.main([], small(benchmark))
    lines = capsys.readouterr().out.splitlines()
    assert lines[1].split()[4::2] == ["-"] * 3
    assert "peer not given" in "\n".join(lines)


@pytest.fixture
def clipping(monkeypatch):
    """The clipping benchmark, its programs run in this process; peers answer made-up numbers."""
    monkeypatch.syspath_prepend(str(PATH.parent))
    names = ("clipping", "clipping_measure", "clipping_models", "clipping_ours")
    for name in names:
        monkeypatch.delitem(sys.modules, name, raising=False)
    module, measure, _, ours = (importlib.import_module(name) for name in names)

    def in_process(python, program, task):
        if program == "clipping_measure.py":
            return {name: "1.2.3" for name in task["packages"]}
        if python == "peer":
            if program == "clipping_opacus.py":
                raise RuntimeError("no such operation")
            seconds = {kind: [0.5 if kind == "plain" else 2.0] * 3 for kind in task["timed"]}
            return {"memory": 10.0 if task["memory"] == "plain" else 25.0, "seconds": seconds}
        with contextlib.redirect_stdout(io.StringIO()) as printed:
            measure.answer(ours.STEPS, module.json.dumps(task))
        return module.json.loads(printed.getvalue().splitlines()[-1])

    monkeypatch.setattr(module, "run", in_process)
    yield module, measure
    for name in names:
        sys.modules.pop(name, None)


def table_of_clipping(clipping, capsys, models, *more):
    module, measure = clipping
    sizes = measure.Sizes(
        units=4,
        filters=2,
        vocabulary=11,
        blocks=1,
        hidden=8,
        tokens=5,
        rows=11,
        width=4,
        units_over_time=3,
        steps=4,
        features=2,
        small_vocabulary=11,
        small_blocks=1,
        small_hidden=8,
    )
    module.main(["--models", *models, "--batches", "3", "--repeats", "3", *more], sizes)
    *versions, table = capsys.readouterr().out.split("model ", 1)
    assert "keras_bandmf: tensorflow 1.2.3, keras 1.2.3" in versions[0]
    return table.splitlines()[1:]


def test_clipping_beside_its_peers(clipping, capsys):
    peers = ["--tfp_python", "peer", "--opacus_python", "peer"]
    lines = table_of_clipping(clipping, capsys, ["embedding"], *peers)
    ours, dense, tfp, jax, *opacus = lines
    assert ours.split()[:4] == ["embedding", "3", "keras_bandmf,", "clipped"]
    assert "over dense" in dense
    # The ratio, its quartiles and what the peer's step takes: 2 s over 0.5 s, 25 MiB over 10.
    assert tfp.split()[4:12] == [
        "500.0",
        "2000.0",
        "4.00",
        "4.00-4.00",
        "25",
        "10",
        "2.50",
        tfp.split()[11],
    ]
    ratio = float(ours.split()[6])
    np.testing.assert_allclose(float(tfp.split()[11]), 4 / ratio, rtol=0.02)
    assert "target 10" in tfp
    assert "absent (--jax_python PATH)" in jax
    assert [("failed: no such operation" in line) for line in opacus] == [True, True]


@pytest.mark.slow
def test_clipping_of_every_model(clipping, capsys):
    models = ["mlp", "cnn", "bert", "lstm", "t5", "deberta"]
    lines = table_of_clipping(clipping, capsys, models)
    ours = [line for line in lines if "keras_bandmf" in line]
    assert [line.split()[0] for line in ours] == ["mlp", "cnn", "bert", *models[2:]]
    assert not any("failed" in line for line in lines)
    # There is no T5 and no DeBERTa for opacus.
    assert sum("absent" in line for line in lines) == 3 * len(models) - 2


def test_the_benchmark_of_amplification_has_a_row_for_each_law(monkeypatch):
    path = PATH.with_name("amplification.py")
    spec = importlib.util.spec_from_file_location("amplification_benchmark", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setattr(module, "_ESTIMATE_SAMPLES", 2**14)
    tiny = module.Run(400, 20, 2, 4, 0.5, 2.0, 1e-4)
    monkeypatch.setitem(module.RUNS, "tiny", tiny)
    records = [module.result("tiny", law) for law in module.LAWS]
    for record in records:
        assert 1.0 <= record["to_estimate"] < 1.1 and record["to_known"] < 1.0
    assert module.table(records).count("| tiny |") == 2
    del records[0]["sigma"]
    assert module.table(records[:1]).count("out of reach") == 1


def test_both_banded_solvers_are_timed(capsys):
    path = PATH.with_name("banded_solvers.py")
    spec = importlib.util.spec_from_file_location("banded_solvers", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.main(sizes=((40, 3),))
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2 and all(number > 0 for number in numbers_of(lines[1]))


def test_sources_prints_draws_formats_and_a_memory_map(capsys, monkeypatch):
    from keras_bandmf.sampling.stores import columns

    monkeypatch.setattr(columns, "MAPPED_BYTES", 0)
    path = PATH.with_name("sources.py")
    spec = importlib.util.spec_from_file_location("sources_benchmark", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.main(["draws", "--rows", "20000"])
    assert capsys.readouterr().out.count("MiB stay") == len(module.LAWS)
    module.main(["formats", "--rows", "300"])
    assert capsys.readouterr().out.count("rows a second") >= 2
    module.main(["memmap", "--gibibytes", "0.002", "--steps", "3"])
    printed = capsys.readouterr().out
    assert "699 rows of 3072 bytes" in printed and "MiB more memory" in printed


@pytest.fixture
def fitting(monkeypatch):
    """The benchmark of `fit`, its tasks done in this process but for starts, which are made up."""
    monkeypatch.syspath_prepend(str(PATH.parent))
    names = ("fit", "clipping_measure", "clipping_models")
    for name in names:
        monkeypatch.delitem(sys.modules, name, raising=False)
    module, measure = (importlib.import_module(name) for name in names[:2])
    starts = {"plain": [0.5, 0.25], "private": [1.25, 2.0]}
    monkeypatch.setattr(
        module, "in_a_process", lambda task: starts.get(task["what"]) or module.answered(task)
    )
    yield module, measure.Sizes(units=4, filters=2)
    for name in names:
        sys.modules.pop(name, None)


def test_fit_is_timed_by_the_epoch_its_start_and_its_pieces(fitting, capsys):
    module, sizes = fitting
    tiny = ["--models", "mlp", "--batch", "8", "--steps", "3", "--epochs", "2"]
    tiny += ["--laws", "random_allocation"]
    module.main([*tiny, "--starts", "1", "--pieces", "1"], sizes)
    epochs, starts, parts = (part.splitlines() for part in capsys.readouterr().out.split("\n\n"))
    for lines in (epochs, starts):
        assert [line.split()[2] for line in lines[1:]] == ["random_allocation"]
        assert "yes  auto" in lines[1]
    plain, private, ratio = (float(text) for text in epochs[1].split()[6:9])
    assert min(plain, private, ratio) >= 0 and epochs[1].split()[-1] == "1.3"
    assert starts[1].split()[6:] == [
        "0.50",
        "1.25",
        "0.75",
        "0.75-0.75",
        "1.75",
        "1.75-1.75",
        "1.0",
    ]
    names = ("draw", "next batch", "plain gradient", "clip, padded", "noise", "update", "metrics")
    assert all(any(line.startswith(f"  {name} ") for line in parts) for name in names)


def test_a_fit_that_fails_ends_the_other_ones_turn(fitting):
    module, sizes = fitting
    task = dict(model="mlp", batch=8, law="fixed_order", metrics=True, replicas=1, jit="auto")
    task |= dict(bands=9, steps=3, epochs=1, rounds=0, sizes=vars(sizes))
    with pytest.raises(ValueError, match="num_bands"):
        module.epochs_in_turns(task)
