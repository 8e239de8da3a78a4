"""A language model tuned privately with LoRA: what is trained, what noise takes, perplexity.

    python examples/lora_language_model.py

Downloads nothing. A small GPT-2 is trained on the documentation of Python, which is public. It is
then tuned privately, by LoRA alone, on sentences that stand in for private ones: those of the
docstrings of NumPy and SciPy, each of which counts as the text of one person. `--texts` reads your
own, one a line, and `--preset` takes a pretrained model of keras_hub, by name or folder:

    python examples/lora_language_model.py --preset gpt2_base_en --texts notes.txt --length 64
"""

from __future__ import annotations

import argparse
import importlib
import inspect
import math
import pathlib
import pydoc_data.topics
import re
import tempfile

import quiet  # noqa: F401 - first

import keras
import keras_hub
import numpy as np
import tokenizers

import keras_bandmf as bandmf

PUBLIC = "argparse asyncio collections datetime decimal email fractions functools inspect io "
PUBLIC += "itertools json logging os pathlib pickle random re shutil socket statistics string "
PUBLIC += "subprocess tarfile tempfile threading typing unittest weakref zipfile"
PRIVATE = "integrate interpolate linalg ndimage optimize signal sparse spatial special stats"


def sentences(texts: list[str]) -> list[str]:
    """Sentences of 20 to 120 characters, each once, in an order that is always the same."""
    found = {
        " ".join(sentence.split())
        for text in texts
        for sentence in re.split(r"(?<=[.:])\s+|\n\s*\n", text)
        if re.fullmatch(r"[A-Z][^>|{}\[\]=]*\.", sentence.strip()) and "--" not in sentence
    }
    return sorted(sentence for sentence in found if 20 <= len(sentence) <= 120)


def docstrings(modules: list) -> list[str]:
    """The docstrings of what modules hold, and of the methods of their classes."""
    found = [getattr(module, name, None) for module in modules for name in dir(module)]
    methods = [vars(each).values() for each in found if inspect.isclass(each)]
    found += [method for of_class in methods for method in of_class]
    return [inspect.getdoc(each) or "" for each in found]


def public_texts() -> list[str]:
    """Sentences of the documentation of Python, which comes with it."""
    modules = [importlib.import_module(name) for name in PUBLIC.split()]
    return sentences([*pydoc_data.topics.topics.values(), *docstrings(modules)])


def private_texts() -> list[str]:
    """Sentences of docstrings: they stand in for texts of persons."""
    modules = [importlib.import_module(f"scipy.{name}") for name in PRIVATE.split()]
    return sentences(docstrings([np, np.linalg, np.random, *modules]))


def small_model(texts: list[str], length: int, epochs: int) -> keras.Model:
    """A GPT-2 of two layers that is trained on public texts, as is its tokenizer."""
    trainer = tokenizers.ByteLevelBPETokenizer()
    special = ["<|pad|>", "<|endoftext|>"]  # keras_hub pads GPT-2's texts with token 0
    trainer.train_from_iterator(texts, vocab_size=1000, special_tokens=special)
    models = keras_hub.models
    with tempfile.TemporaryDirectory() as folder:
        trainer.save_model(folder)
        tokenizer = models.GPT2Tokenizer(f"{folder}/vocab.json", f"{folder}/merges.txt")
    backbone = models.GPT2Backbone(
        tokenizer.vocabulary_size(), 2, 4, 64, 256, max_sequence_length=length
    )
    model = models.GPT2CausalLM(backbone, models.GPT2CausalLMPreprocessor(tokenizer, length))
    model.compile(keras.optimizers.Adam(3e-3))
    model.fit(texts, batch_size=32, epochs=epochs, verbose=2)
    return model


def perplexity(model: keras.Model, texts: list[str]) -> float:
    """The exponential of the mean loss of a token. Keras's own mean counts padding, as zeros."""
    _, _, weights = model.preprocess_samples(texts)
    return math.exp(model.evaluate(texts, verbose=0)[0] / np.mean(weights))


def table_of_training(model: keras.Model) -> str:
    """A line for each layer that is trained: its path to clipped gradients, and its weights."""
    trained = {weight.path: math.prod(weight.shape) for weight in model.trainable_variables}
    lines = ["| layer | class | clipping | weights trained |", "|---|---|---|---|"]
    for path, kind, route, _ in bandmf.clipping.explain(model).rows:
        own = {p: count for p, count in trained.items() if p.rpartition("/")[0] == path}
        if own:
            names = ", ".join(p.rpartition("/")[2] for p in own)
            lines.append(f"| {path} | {kind} | {route} | {names}: {sum(own.values()):,} |")
    return "\n".join(lines)


def table_of_noise(model: keras.Model) -> str:
    """What the noise of the run keeps, and would keep if all weights were trained."""
    trained = sum(math.prod(weight.shape) for weight in model.trainable_variables)
    everything, bands = model.count_params(), model.optimizer.plan.num_bands
    kept = model.optimizer.run_state.noise.state_bytes
    return "\n".join(
        [
            f"| trained | weights | noise of {bands} bands | bands in 1 GiB |",
            "|---|---|---|---|",
            f"| LoRA | {trained:,} | {kept:,} bytes | "
            f"{bandmf.max_bands_for_memory(trained, 2**30):,} |",
            f"| all | {everything:,} | {4 * (bands - 1) * everything:,} bytes | "
            f"{bandmf.max_bands_for_memory(everything, 2**30):,} |",
        ]
    )


def parsed(arguments: list[str] | None) -> argparse.Namespace:
    """The options of the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--texts", type=pathlib.Path, help="private texts, one a line")
    parser.add_argument("--preset", help="name or folder of a pretrained model of keras_hub")
    parser.add_argument("--public_epochs", type=int, default=8, help="of the small model")
    parser.add_argument("--length", type=int, default=32, help="tokens of a text")
    parser.add_argument("--rank", type=int, default=4, help="of LoRA")
    parser.add_argument("--int8", action="store_true", help="quantize the frozen weights")
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--batch_size", type=int, default=256)
    parser.add_argument("--bands", type=int, default=16)
    parser.add_argument("--learning_rate", type=float, default=0.01)
    parser.add_argument("--l2_norm_clip", type=float, default=0.1)
    parser.add_argument("--epsilon", type=float, default=8.0)
    parser.add_argument("--most", type=int, help="the number of texts to take at most")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> None:
    """Trains privately, and prints the tables, perplexity and the statement."""
    options = parsed(arguments)
    keras.utils.set_random_seed(0)
    texts = options.texts.read_text().splitlines() if options.texts else private_texts()
    texts = list(np.random.default_rng(0).permutation(texts)[: options.most])
    cut = len(texts) // 10
    held_out, private = texts[:cut], texts[cut:]
    if options.preset:
        model = keras_hub.models.CausalLM.from_preset(options.preset)
        model.preprocessor.sequence_length = options.length
    else:
        model = small_model(public_texts()[: options.most], options.length, options.public_epochs)
    if options.int8:
        model.backbone.quantize("int8", filters=lambda each: not _is_table(each))
    model.backbone.enable_lora(options.rank)

    plan = bandmf.TrainingPlan.calibrate(
        num_examples=len(private),
        batch_size=options.batch_size,
        num_steps=options.steps,
        num_bands=options.bands,
        epsilon=options.epsilon,
        delta=1 / (10 * len(private)),
    )
    model = bandmf.privatize(model, microbatch_size="auto")
    inner = keras.optimizers.Adam(options.learning_rate)
    model.compile(optimizer=bandmf.BandMFOptimizer(inner, plan, options.l2_norm_clip))
    frozen = {w.path: w.numpy() for w in model.non_trainable_variables}
    before = perplexity(model, held_out)
    model.fit(private, verbose=2)
    after = perplexity(model, held_out)

    moved = [w.path for w in model.non_trainable_variables if np.any(w.numpy() != frozen[w.path])]
    print(f"\n{table_of_training(model)}\n\nfrozen weights that moved: {len(moved)}\n")
    print(f"{table_of_noise(model)}\n")
    print(f"perplexity on {len(held_out)} held-out texts: {before:.2f} before, {after:.2f} after")
    print(model.generate("Returns the", max_length=options.length), "\n")
    print(bandmf.statement(model))


def _is_table(layer: keras.layers.Layer) -> bool:
    return isinstance(layer, keras.layers.Embedding)


if __name__ == "__main__":
    main()
