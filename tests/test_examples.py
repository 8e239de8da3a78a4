"""Examples: the paper's figures at sizes that take seconds, against values known by other means."""

import importlib
import math
import os
import pathlib
import re
import subprocess
import sys

import numpy as np
import pytest
import tensorflow as tf

import keras_bandmf as bandmf
from keras_bandmf.strategies import BandedStrategy
from tests.strategies import reference

axes = pytest.importorskip("matplotlib.axes")
EXAMPLES = pathlib.Path(__file__).parent.parent / "examples"
SMALL = ["--max_steps", "16", "--num_steps", "32", "--epochs", "4", "--epsilons", "4", "8"]


@pytest.fixture
def example(monkeypatch):
    monkeypatch.syspath_prepend(str(EXAMPLES))
    return importlib.import_module


def test_every_figure_is_drawn_and_tabulated(example, tmp_path, capsys):
    example("paper_figures").main(["--output", str(tmp_path), *SMALL])
    printed = capsys.readouterr().out
    for name in ("toeplitz_gap", "bands", "mechanisms", "full_batch"):
        assert (tmp_path / f"{name}.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
        table = (tmp_path / f"{name}.md").read_text()
        assert table in printed
        widths = {line.count("|") for line in table.splitlines() if line.startswith("|")}
        assert len(widths) == 1
        assert "nan" not in table


def test_gaps_are_those_of_dense_matrices(example):
    numbers = example("paper_numbers")
    (found,) = (gap for gap in numbers.gaps(16) if gap.num_bands == 4)
    assert (found.num_steps, found.exact) == (16, pytest.approx(1.902896, rel=1e-6))
    # From the reference table of raw and column-normalized strategies.
    assert (found.raw, found.normalized) == (
        pytest.approx(1.820, abs=1e-3),
        pytest.approx(1.085, abs=1e-3),
    )


def test_points_are_bounded(example):
    points = example("paper_numbers").gap_points(10**6)
    assert {(10**6, 32), (100_000, 32), (16, 16), (64, 64)} <= set(points)
    assert max(n * b for n, b in points) <= 32 * 10**6
    assert not [(n, b) for n, b in points if b > n]


def test_fixed_order_errors_are_those_of_dense_matrices(example):
    numbers = example("paper_numbers")
    n, k = 32, 4
    found = numbers.fixed_order_errors(n, k)
    root = np.linalg.inv(np.tri(n))  # its inverse square root: the square root of this
    column = np.cumprod(np.append(1.0, (2 * np.arange(1, n) - 1) / (2 * np.arange(1, n))))
    c = sum(np.diag(np.full(n - lag, column[lag]), -lag) for lag in range(n))
    np.testing.assert_allclose(c @ c @ root, np.eye(n), atol=1e-12)
    error = np.mean(np.sum(np.square(np.tri(n) @ np.linalg.inv(c)), axis=1))
    sensitivity = np.linalg.norm(np.sum(c[:, :: n // k], axis=1))
    assert found["square root"] == pytest.approx(sensitivity * math.sqrt(error) / k, rel=1e-9)
    # BandMF is the optimum of the least restricted class: the others are above it.
    assert min(found, key=found.get) == "BandMF, fixed order"
    banded = BandedStrategy.optimize(n, n // k)
    dense = reference.dense_errors(banded.materialize())
    assert found["BandMF, fixed order"] >= math.sqrt(np.mean(dense) / k)


def test_full_batches_are_one_gaussian(example):
    numbers = example("paper_numbers")
    # notes: the analytic Gaussian's noise multiplier; RMSE = sigma sqrt((n + 1) / (2 n)).
    expected = 4.22468 * math.sqrt(33 / 64)
    assert numbers.full_batch(32, 1.0, 1e-6) == pytest.approx(expected, rel=2e-3)
    # The last of the epochs is the full batch, whatever the sampling is called.
    swept = numbers.sweep(32, 32, 1.0, 1e-6)
    assert swept.choice.dp_sgd.expected_rmse == pytest.approx(expected, rel=2e-3)
    assert swept.unamplified == pytest.approx(expected, rel=2e-3)


def test_the_rule_is_judged_at_the_nearest_candidate(example):
    swept = example("paper_numbers").sweep(64, 2, 1.0, 1e-5)
    assert swept.rule == 4.0
    (four,) = (row for row in swept.choice.candidates if row.num_bands == 4)
    assert swept.rmse_by_rule == four.expected_rmse >= swept.choice.best.expected_rmse


@pytest.mark.slow
@pytest.mark.parametrize("base", [[], ["--int8"]], ids=["float32", "int8"])
def test_lora_trains_its_own_weights_alone_and_its_noise_is_small(example, base, capsys):
    pytest.importorskip("keras_hub")
    size = ["--most", "400", "--public_epochs", "1", "--batch_size", "40", "--length", "16"]
    example("lora_language_model").main([*base, *size, "--steps", "8", "--bands", "4"])
    printed = capsys.readouterr().out
    trained = [line for line in printed.splitlines() if "lora_kernel_a" in line]
    assert len(trained) == 4 and all("| book-keeping |" in line for line in trained)
    assert "frozen weights that moved: 0" in printed
    lora, everything = (
        int(re.search(rf"\| {name} \| .* \| ([\d,]+) bytes", printed)[1].replace(",", ""))
        for name in ("LoRA", "all")
    )
    assert lora == 4 * 3 * 5 * 1024  # three rows of 4,608 weights, in whole chunks
    assert everything > 20 * lora
    assert re.search(r"perplexity on 40 held-out texts: \d+\.\d+ before, \d+\.\d+ after", printed)
    assert "epsilon    8 by the PLD accountant" in printed


TUNED = ["--batch_size", "40", "--epochs", "2", "--epsilon", "8", "--seeds", "1"]


@pytest.fixture
def two_mechanisms(example, monkeypatch):
    """Nothing private, and two bands: no search for the number of bands."""
    monkeypatch.setattr(example("tuned"), "LAWS", {"BandMF": {"num_bands": 2}})


def test_scattering_tunes_on_held_out_rows_and_goes_on(example, tmp_path, capsys, two_mechanisms):
    scattering = example("scattering")
    rng = np.random.default_rng(0)
    labels = {"train": rng.integers(0, 10, 5_400), "test": rng.integers(0, 10, 300)}
    for part, y in labels.items():  # in place of features: the class, and some noise
        x = np.eye(10)[y] + rng.normal(scale=0.1, size=(len(y), 10))
        np.save(tmp_path / f"digits-{part}.npy", x.astype("float16"))
    data = tmp_path / "digits.npz"
    np.savez(data, **{f"y_{part}": y for part, y in labels.items()})
    rates = ["--rates", "1e-4", "1", "--plain_rates", "0.1", "--l2_norm_clip", "1"]
    command = ["--data", str(data), "--output", str(tmp_path), *TUNED, *rates]
    scattering.main([*command, "--plans"])
    assert "held out" not in capsys.readouterr().out
    scattering.main([*command, "--only", "not private"])
    assert capsys.readouterr().out.count("held out ") == 2
    scattering.main(command)
    printed = capsys.readouterr().out
    assert printed.count("held out ") == 3 and "not private, rate" not in printed
    row = next(line for line in printed.splitlines() if line.startswith("BandMF  "))
    tried = dict(re.findall(r"BandMF, rate (\S+), seed 0: held out (\S+),", printed))
    assert len(tried) == 2 and tried[row.split()[4]] == max(tried.values())
    assert f"rate {row.split()[4]}, seed 1: " in printed and float(row.split()[5]) > 0.5
    scattering.main(command)
    again = capsys.readouterr().out
    assert "held out" not in again and row in again
    scattering.main([*command, "--delta", "1e-4"])
    assert capsys.readouterr().out.count("held out ") == 5  # of another delta nothing is kept

    rates_example = example("rates")
    folder = next(path.parent for path in tmp_path.glob("*-1e-05-*/BandMF.json"))
    found = rates_example.scores(folder / "BandMF.json")
    assert list(found) == [1e-4, 1.0]
    assert [f"{score:.4f}" for score in found.values()] == [tried["0.0001"], tried["1"]]
    rates_example.main([str(folder), "--to", str(tmp_path / "rates.png")])
    assert (tmp_path / "rates.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(SystemExit, match="Expected a folder with runs of private mechanisms"):
        rates_example.main([str(tmp_path), "--to", str(tmp_path / "none.png")])


@pytest.mark.slow
@pytest.mark.parametrize("shape", [(28, 28), (32, 32, 3)])
def test_convolutions_are_tuned_with_and_without_views(
    example, tmp_path, capsys, two_mechanisms, shape
):
    rng = np.random.default_rng(0)
    data = tmp_path / "pictures.npz"
    sizes = {"train": 5_080, "test": 20}
    labels = {f"y_{part}": rng.integers(0, 10, size) for part, size in sizes.items()}
    pictures = {
        f"x_{part}": rng.integers(0, 256, (size, *shape), dtype="uint8")
        for part, size in sizes.items()
    }
    np.savez(data, **labels, **pictures)
    command = ["--data", str(data), "--output", str(tmp_path), *TUNED, "--plain_rates", "0.1"]
    convolutions = example("convolutions")
    convolutions.main([*command, "--rates", "0.1", "--only", "BandMF", "not private"])
    assert len(re.findall(r"^(?:BandMF|not private) .*0\.\d+$", capsys.readouterr().out, re.M)) == 2
    convolutions.main([*command, "--rates", "0.1", "--only", "BandMF", "--augment_copies", "2"])
    assert (tmp_path / "pictures-2-8-1e-05-40-2-1" / "BandMF.json").exists()


@pytest.mark.slow
def test_users_are_compared_with_the_baseline_of_rows(example, tmp_path, capsys, two_mechanisms):
    rng = np.random.default_rng(0)
    pictures = {
        f"x_{part}": rng.integers(0, 256, (size, 28, 28), dtype="uint8")
        for part, size in (("train", 500), ("test", 40))
    }
    labels = {f"y_{part}": np.arange(len(pictures[f"x_{part}"])) % 10 for part in ("train", "test")}
    np.savez(tmp_path / "mnist.npz", **pictures, **labels)
    command = ["--data", str(tmp_path / "mnist.npz"), "--output", str(tmp_path), *TUNED]
    example("user_level").main([*command, "--users", "400", "--rates", "0.1"])
    printed = capsys.readouterr().out
    assert re.search(r"^users, BandMF +2 .*0\.\d+$", printed, re.M)
    assert re.search(r"^rows, DP-SGD +1 .*0\.\d+$", printed, re.M)


@pytest.mark.slow
def test_perplexity_takes_the_lower_one(example, tmp_path, capsys, two_mechanisms):
    pytest.importorskip("keras_hub")
    size = ["--most", "400", "--public_epochs", "1", "--length", "16", "--l2_norm_clip", "1"]
    rates = ["--rates", "1e-2", "1e3", "--plain_rates", "1e-2"]
    command = ["--output", str(tmp_path), *TUNED, *size, *rates]
    example("perplexity").main(command)
    printed = capsys.readouterr().out
    tried = re.findall(r"BandMF, rate (\S+), seed 0: held out (\S+),", printed)
    rate, _ = min(tried, key=lambda each: float(each[1]))
    row = re.search(r"^BandMF +2 .*$", printed, re.M)[0].split()
    assert len(tried) == 2 and row[4] == rate and 1 < float(row[5])


@pytest.mark.slow
def test_sst2_trains_all_weights_lora_and_rgp(example, tmp_path, capsys, monkeypatch):
    sst2, tuned, bert = example("sst2"), example("tuned"), example("bert_sst2")
    keras_hub = pytest.importorskip("keras_hub")
    laws = {f"{name} allocated": {"num_bands": b} for name, b in (("DP-SGD", 1), ("BandMF", 2))}
    monkeypatch.setattr(tuned, "LAWS", laws)
    monkeypatch.setattr(
        bert.keras_nlp.models.BertBackbone,
        "from_preset",
        lambda *_, **kw: keras_hub.models.BertBackbone(
            50, 1, 2, 8, 16, max_sequence_length=8, **kw
        ),
    )
    rng = np.random.default_rng(0)
    tokens = {part: rng.integers(1, 50, (n, 8)) for part, n in (("train", 5_080), ("dev", 20))}
    labels = {f"y_{part}": ids[:, 0] % 2 for part, ids in tokens.items()}
    np.savez(tmp_path / "tokens-8.npz", **tokens, **labels)
    np.save(tmp_path / "sentences.npy", np.arange(5_080))
    rates = ["--rates", "1e-3", "--lora_rates", "1e-2", "--plain_rates", "1e-3"]
    command = ["--output", str(tmp_path), "--preset", str(tmp_path), "--length", "8", *TUNED]
    sst2.main([*command, *rates, "--plain_batch_size", "40", "--feature_scale", "0.1"])
    printed = capsys.readouterr().out
    for label in ("not private", "DP-SGD", "BandMF", "LoRA DP-SGD", "LoRA BandMF", "RGP"):
        assert len(re.findall(f"^{label},", printed, re.M)) == 2
    # Another model: its runs must not be mixed with those of the default.
    assert list(tmp_path.glob("sst2-8-40-features-0.1-sentences-*"))


def test_sst2_holds_out_sentences_with_all_of_their_phrases(example):
    pytest.importorskip("keras_nlp")
    sst2 = example("sst2")
    rows = ["good", "a good film", "a very bad film", "very bad", "a good", "goo", "bad film"]
    sentences = sst2.sentence_of_each(rows)
    # "goo" is no phrase of "a good film": words count, not letters.
    assert sentences.tolist() == [1, 1, 2, 2, 1, 5, 2]
    for amount in range(len(rows)):
        order = sst2.whole_sentences_last(sentences, amount)
        assert sorted(order) == list(range(len(rows)))
        trained, held_out = np.split(sentences[order], [len(rows) - amount])
        if amount in (1, 4):  # "goo", and with it one of the others
            assert not set(trained) & set(held_out)


@pytest.mark.slow
def test_the_audit_prints_three_reports_and_draws(example, tmp_path, capsys):
    example("audit").main(["--trials", "400", "--canaries", "60", "--output", str(tmp_path)])
    printed = capsys.readouterr().out
    assert printed.count("Privacy audit (step)") == 1
    assert printed.count("Privacy audit (one run)") == 2
    assert (tmp_path / "audit.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"


@pytest.mark.parametrize("seeds", [1, 2])
def test_one_seed_has_no_spread(example, tmp_path, monkeypatch, seeds):
    comparison = example("comparison")
    plan = bandmf.TrainingPlan(
        num_examples=100, batch_size=10, epochs=2, noise_multiplier=2.0, delta=1e-5, num_bands=1
    )
    accuracy = np.array([[0.5, 0.75], [0.5, 0.25]])[:seeds]
    results = [comparison.Result(name, plan, accuracy, "") for name in "abcd"]
    table = comparison.report(results)
    assert ("+-" in table) == (seeds > 1) and "0.0000" not in table and "nan" not in table

    bands = []
    monkeypatch.setattr(axes.Axes, "fill_between", lambda *args, **options: bands.append(args))
    task = comparison.Task("digits", (), (), None, 2, 1.0)
    comparison.draw(task, results, tmp_path / "picture.png")
    assert len(bands) == 4 * (seeds > 1)
    assert (tmp_path / "picture.png").stat().st_size > 1000


@pytest.mark.slow
def test_examples_start_quietly_and_show_errors():
    code = "import os, quiet; os.write(2, b'an error'); import keras_bandmf"
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        env={**os.environ, "PYTHONPATH": f"{EXAMPLES}{os.pathsep}{EXAMPLES.parent}"},
        check=True,
    )
    assert done.stderr == b"an error"


def test_only_known_noise_is_left_out(example, monkeypatch, capfd):
    quiet = example("quiet")
    lines = [b"I0000 00:00 cudart_stub.cc:31] no GPU\n", b"W0000 a library is missing\n"]

    def write(*_):
        os.write(2, b"".join(lines))

    monkeypatch.setattr(tf.config, "list_physical_devices", write)
    quiet.load()
    assert capfd.readouterr().err.encode() == lines[1]


def test_every_example_that_loads_tensorflow_does_so_quietly():
    for path in EXAMPLES.glob("*.py"):
        text = path.read_text()
        first = re.search(r"^(?:import|from) (?:keras|tensorflow|keras_bandmf)\b", text, re.M)
        ways = [f"import {name}" for name in ("quiet", "configurations", "comparison", "tuned")]
        if first and "__main__" in text:
            assert any(way in text[: first.start()] for way in ways), path.name
