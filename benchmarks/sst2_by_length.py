"""SST-2 with the pretrained BERT of examples/sst2.py, within an hour on two CPU cores.

    python benchmarks/sst2_by_length.py --train train.tsv --dev dev.tsv --output sst2 --rate 6e-3

Sampling, noise and clipped gradients are what the private `fit` has under the same plan, but this
is a simulation: its seeds are known, and no record of the run is kept. It is faster than `fit` on a
CPU, for sentences are clipped together with others of about their length and not padded to the
longest. Each is padded to its own length, rounded up, so that its gradient does not depend on the
others. What the layers return that are not trained is kept, in float16. Prints the accuracy on the
sentences that are held out, and on the development set. `--plain` trains without privacy:

    python benchmarks/sst2_by_length.py --train train.tsv --dev dev.tsv --output sst2 --plain \
        --rate 2e-4 --batch_size 128 --epochs 3 --feature_scale 10

`--save` keeps the weights in a file, and `--start` begins with those of such a file, of a model
that was trained on other sentences: public ones, as those of public_reviews.py. `--fraction` tries
a plan in less time: on a part of each batch, with the same part of the noise of its sum, so that
the noise of the mean gradient is that of the plan. `--public` is a table of public sentences, in
whose gradients the carriers of `--rgp_rank` are found.
"""

from __future__ import annotations

import argparse
import pathlib
import sys
import time
from collections.abc import Iterable, Iterator

sys.path.insert(0, str(pathlib.Path(__file__).parents[1] / "examples"))

import tuned  # first, for it imports `quiet`

import bert_sst2
import keras
import keras_nlp
import numpy as np
import sst2
import tensorflow as tf

import keras_bandmf as bandmf
from keras_bandmf.rgp.run import RunCarriers

LENGTHS = (8, 12, 16, 24, 32, 48)
TOKENS = 2_048  # about as many are clipped at a time
NUM_PUBLIC = 500  # sentences in whose gradients carriers are found
PLAIN_TOKENS = 512  # or passed, where nothing is private and batches are small


class Sentences:
    """Hidden states of all sentences as they enter the first layer that is trained.

    Attributes:
        labels: of each sentence.
        parts: the numbers of the sentences to train on, held out, and of the test set.
    """

    def __init__(self, options: argparse.Namespace, encoder: keras.Model) -> None:
        data = sst2.load(options, bert_sst2.default_preset(), options.num_held_out)
        inputs = keras.tree.map_structure(
            lambda *parts: np.concatenate(parts), *(x for x, _ in data.values())
        )
        self.labels = np.concatenate([y for _, y in data.values()])
        ends = np.cumsum([len(y) for _, y in data.values()])
        self.parts = dict(zip(data, np.split(np.arange(ends[-1]), ends[:-1]), strict=True))
        self._lengths = inputs["padding_mask"].sum(axis=1)
        self._padded = np.array(LENGTHS)[np.searchsorted(LENGTHS, self._lengths)]
        self._offsets = np.concatenate([[0], np.cumsum(self._lengths)])
        self._states = np.empty((self._offsets[-1], encoder.output.shape[-1]), np.float16)
        first = tf.function(encoder, reduce_retracing=True)
        for length in LENGTHS:
            same = np.flatnonzero(self._padded == length)
            for start in range(0, len(same), 512):
                rows = same[start : start + 512]
                some = {name: array[rows, :length] for name, array in inputs.items()}
                for row, states in zip(rows, first(some).numpy(), strict=True):
                    self._states[self._span(row)] = states[: self._lengths[row]]

    def _span(self, row: int) -> slice:
        return slice(self._offsets[row], self._offsets[row + 1])

    def by_length(
        self, rows: np.ndarray, tokens: int = TOKENS
    ) -> Iterator[tuple[dict, np.ndarray, np.ndarray]]:
        """Yields (inputs, labels, mask) of sentences of about one length, in two sizes for each."""
        for length in LENGTHS:
            same = rows[self._padded[rows] == length]
            large, first = tokens // length, 0
            small = large // 4
            while first < len(same):
                size = large if len(same) - first > 3 * small else small
                some = same[first : first + size]
                first += size
                states = np.zeros((size, length, self._states.shape[1]), np.float32)
                words = np.zeros((size, length), np.int32)
                words[:, 0] = 1  # no row is without a word, for a mean is taken
                for i, row in enumerate(some):
                    states[i, : self._lengths[row]] = self._states[self._span(row)]
                    words[i, : self._lengths[row]] = 1
                labels = np.pad(self.labels[some], (0, size - len(some))).astype("int32")
                yield {"states": states, "words": words}, labels, np.arange(size) < len(some)


def make_models(options: argparse.Namespace) -> tuple[keras.Model, keras.Model]:
    """The layers that stay as they are, and those that are trained, with the head."""
    encoder = keras_nlp.models.BertBackbone.from_preset(
        str(bert_sst2.default_preset()), dropout=0.0
    )
    if options.lora_rank:
        encoder.enable_lora(options.lora_rank)
    layers = [each for each in encoder.layers if each.name.startswith("transformer_layer")]
    frozen = keras.Model(encoder.inputs, layers[options.first_layer].input[0])
    inputs = {
        "states": keras.Input((None, frozen.output.shape[-1]), name="states"),
        "words": keras.Input((None,), dtype="int32", name="words"),
    }
    hidden = inputs["states"]
    for layer in layers[options.first_layer :]:
        hidden = layer(hidden, padding_mask=inputs["words"])
    head = bert_sst2.logits(hidden, inputs["words"], options.feature_scale)
    return frozen, keras.Model(inputs, head)


def save(options: argparse.Namespace, *models: keras.Model) -> None:
    """Keeps all weights, each under its path, whichever of the models its layer is in."""
    found = {each.path: each.numpy() for model in models for each in model.variables}
    np.savez(options.save, feature_scale=options.feature_scale, **found)


def start(options: argparse.Namespace, *models: keras.Model) -> None:
    """Takes the weights of a file, so that the models return what those that were saved did."""
    with np.load(options.start) as file:
        ratio = file["feature_scale"] / options.feature_scale
        for weight in (each for model in models for each in model.variables):
            if weight.name.startswith("lora_"):
                continue  # it is new, and changes nothing yet
            factor = ratio if weight.path == "head/kernel" else 1.0
            weight.assign(factor * file[weight.path])


def public_batches(
    options: argparse.Namespace, frozen: keras.Model
) -> list[tuple[dict, np.ndarray]]:
    """Batches of about 16 public sentences of about one length."""
    own = argparse.Namespace(**vars(options) | {"train": options.public, "held_out": "rows"})
    own.output = options.output / f"public-{options.public.stem}"
    own.num_held_out = 1
    sentences = Sentences(own, frozen)
    rows = np.random.default_rng(0).permutation(sentences.parts["train"])[:NUM_PUBLIC]
    return [
        ({name: states[mask] for name, states in x.items()}, y[mask])
        for x, y, mask in sentences.by_length(rows, tokens=256)
    ]


def make_plan(options: argparse.Namespace, num_examples: int) -> bandmf.TrainingPlan:
    """The plan of examples/sst2.py."""
    return bandmf.TrainingPlan.calibrate(
        num_examples=num_examples,
        batch_size=options.batch_size,
        epochs=options.epochs,
        epsilon=options.epsilon,
        delta=1e-5,
        num_bands=options.bands if options.bands == "auto" else int(options.bands),
        **tuned.ALLOCATED,
    )


def shuffled(options: argparse.Namespace, num_examples: int) -> np.ndarray:
    """Batches that are not private, one in a row: each epoch in an order of its own."""
    rng = np.random.default_rng(options.seed)
    whole = num_examples // options.batch_size * options.batch_size
    orders = [rng.permutation(num_examples)[:whole] for _ in range(options.epochs)]
    return np.concatenate(orders).reshape(-1, options.batch_size)


def some_of(batches: Iterable[np.ndarray], options: argparse.Namespace) -> list[np.ndarray]:
    """A part of each batch, drawn at random."""
    rng = np.random.default_rng(options.seed)
    return [rng.choice(r, round(options.fraction * len(r)), replace=False) for r in batches]


def make_schedule(
    options: argparse.Namespace, num_steps: int
) -> keras.optimizers.schedules.LearningRateSchedule:
    """A learning rate that falls to zero: linearly, or as a cosine after it has grown."""
    schedules = keras.optimizers.schedules
    if not options.warmup:
        return schedules.PolynomialDecay(options.rate, num_steps, 0.0)
    rest = num_steps - options.warmup
    return schedules.CosineDecay(0.0, rest, warmup_target=options.rate, warmup_steps=options.warmup)


def main() -> None:
    """Plans, trains, prints."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    sst2.add_data_arguments(parser, required=True)
    parser.add_argument("--output", type=pathlib.Path, required=True, help="folder of tokens")
    parser.add_argument("--epsilon", type=float, default=8.0)
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--batch_size", type=int, default=1_000)
    parser.add_argument("--bands", default="auto", help='a number, or "auto"; 1 is DP-SGD')
    parser.add_argument("--rate", type=float, default=6e-3)
    parser.add_argument("--warmup", type=int, default=0, help="steps in which the rate grows")
    parser.add_argument("--feature_scale", type=float, default=0.1)
    parser.add_argument("--l2_norm_clip", type=float, default=0.3)
    parser.add_argument("--first_layer", type=int, default=0, help="the first one that is trained")
    parser.add_argument("--lora_rank", type=int, default=0, help="trains LoRA of this rank")
    parser.add_argument("--rgp_rank", type=int, default=0, help="of carriers; 0 is without")
    parser.add_argument("--public", type=pathlib.Path, help="a table, for carriers that stay")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--plain", action="store_true", help="train without privacy")
    parser.add_argument("--fraction", type=float, default=1.0, help="of each batch that is used")
    parser.add_argument("--no_noise", action="store_true", help="clip, but add no noise")
    parser.add_argument("--start", type=pathlib.Path, help="a file of weights to begin with")
    parser.add_argument("--save", type=pathlib.Path, help="a file for the weights, in the end")
    parser.add_argument("--num_held_out", type=int, default=tuned.HELD_OUT, help="rows")
    parser.add_argument("--every", type=int, default=31, help="steps between two evaluations")
    options = parser.parse_args()
    if options.public and not options.rgp_rank:
        parser.error("--public finds the carriers of --rgp_rank, which is not given")
    options.length = LENGTHS[-1]
    tf.get_logger().setLevel("ERROR")  # each length and size is traced, and TensorFlow warns of it
    keras.utils.set_random_seed(options.seed)
    frozen, model = make_models(options)
    if options.start:
        start(options, frozen, model)
    sentences = Sentences(options, frozen)
    train = sentences.parts["train"]
    weights = model.trainable_variables
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    if options.plain:
        batches, tokens = shuffled(options, len(train)), PLAIN_TOKENS
        carriers, noise = RunCarriers(weights, None), None
    else:
        tokens = TOKENS
        plan = make_plan(options, len(train))
        print(f"{plan.num_bands} bands, noise multiplier {plan.noise_multiplier:.3f}", flush=True)
        sampled = plan.batches(np.zeros(len(train), np.int8), seed=options.seed)
        batches = [sampled.indices(t) for t in range(plan.num_steps)]
        rank = options.rgp_rank
        if options.public:
            public = public_batches(options, frozen)
            found = bandmf.public_carriers(model, public, rank, loss, options.l2_norm_clip)
            bandmf.enable_rgp(model, rank, carriers=found)
        elif rank:
            bandmf.enable_rgp(model, rank, warmup_steps=plan.num_steps, restart=True)
        carriers = RunCarriers(weights, plan.strategy)
        carriers.start(np.array([options.seed, 0], np.uint64))
        noise = None
        if not options.no_noise:
            noise = bandmf.noise.CorrelatedNoise(
                plan.strategy,
                options.fraction * plan.noise_stddev(options.l2_norm_clip),
                carriers.shapes,
                seed=options.seed,
            )
    if options.fraction < 1:
        batches = some_of(batches, options)
    mean_of = options.fraction * options.batch_size
    sums = [tf.Variable(tf.zeros(shape)) for shape in carriers.shapes]
    optimizer = keras.optimizers.Adam(make_schedule(options, len(batches)))
    optimizer.build(weights)

    @tf.function(jit_compile=True)
    def add(x: dict, y: tf.Tensor, mask: tf.Tensor) -> None:
        if options.plain:
            with tf.GradientTape() as tape:
                # The mean over the rows of padding, too, which have no weight.
                mean = loss(y, model(x), sample_weight=tf.cast(mask, tf.float32))
            found = [each * float(len(y)) for each in tape.gradient(mean, weights)]
        else:
            found = bandmf.clipped_gradients(
                model, x, y, l2_norm_clip=options.l2_norm_clip, mask=mask, loss=loss
            ).sums
        for total, each in zip(sums, found, strict=True):
            total.assign_add(each)

    @tf.function(jit_compile=True)
    def predicted(x: dict) -> tf.Tensor:
        return tf.argmax(model(x), axis=1)

    @tf.function
    def step() -> None:
        found = [tf.convert_to_tensor(total) for total in sums]
        if noise is not None:
            found = [total + each for total, each in zip(found, noise.next(), strict=True)]
        gradients = [each / mean_of for each in carriers.gradients(found)]
        optimizer.apply(gradients, weights)
        carriers.refresh(optimizer.iterations.value, 0)
        for total in sums:
            total.assign(tf.zeros_like(total))

    def accuracy(rows: np.ndarray) -> float:
        right = [
            (predicted(x).numpy() == y)[mask].sum() for x, y, mask in sentences.by_length(rows)
        ]
        return sum(right) / len(rows)

    def report(step: int) -> None:
        found = (f"{part} {accuracy(sentences.parts[part]):.4f}" for part in ("held out", "test"))
        print(f"step {step}: {', '.join(found)} ({time.time() - started:.0f} s)", flush=True)

    started = time.time()
    if options.start:
        report(0)
    for t, rows in enumerate(batches):
        for x, y, mask in sentences.by_length(train[rows], tokens):
            add(x, y, mask)
        step()
        if (t + 1) % options.every == 0 or t + 1 == len(batches):
            report(t + 1)
    if options.save:
        save(options, frozen, model)


if __name__ == "__main__":
    main()
