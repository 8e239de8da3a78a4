"""Does it pay to scale gradients before they are clipped? Adam with and without, in NumPy.

    python benchmarks/scaled_gradients.py --task digits
    python benchmarks/scaled_gradients.py --task words --train train.tsv.gz --dev dev.tsv.gz

Scale-then-privatize (arXiv 2507.01129) divides every coordinate of a gradient by its size in
earlier steps, clips, adds noise, and multiplies again, so that coordinates with small gradients get
less noise. Here the sizes have rank one, as those of Adafactor: a factor for each row and each
column of a kernel. With them the norm of a scaled gradient costs no more than that of a plain one,
where it is computed from layer inputs and output gradients. They are estimated from the noisy
gradients of earlier steps alone, less the variance of the noise, and stay within a factor of that
variance. Without these bounds, less noise would make a size smaller, hence the noise less, and so
on, and training would diverge.

Plans are those of the library. Training is simulated in NumPy, many runs at once; both ways have
the same initial weights, batches and normals, so that their difference is known better than the
accuracies. NumPy's generator is no secret, so nothing here protects anybody. Prints means over the
runs in points, with standard errors.
"""

from __future__ import annotations

import argparse
import collections
import dataclasses
import os
import pathlib
import sys

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
sys.path.insert(0, str(pathlib.Path(__file__).parent.parent / "examples"))

import curvature
import numpy as np
from curvature import CLIP

import keras_bandmf as bandmf
from keras_bandmf.strategies.noise_variances import noise_variances

BETA_1, BETA_2, EPSILON = 0.9, 0.999, 1e-8
# Of the average of squared gradients, and the steps without scales while it settles.
DECAY, FIRST = 0.99, 5
WORDS, EMBEDDING = 2_000, 8


@dataclasses.dataclass(frozen=True)
class Task:
    """Data, and a network of one hidden layer.

    Attributes:
        x: (examples, features), float32.
        y: (examples, classes), float32, one-hot.
        x_test: (test examples, features).
        y_test: (test examples,), classes.
        batch_size: expected examples of a step.
        epochs: passes over the data.
        hidden: units of the hidden layer.
        linear: whether the hidden layer is a mean of embeddings: no bias, no activation.
    """

    x: np.ndarray
    y: np.ndarray
    x_test: np.ndarray
    y_test: np.ndarray
    batch_size: int
    epochs: int
    hidden: int
    linear: bool

    @property
    def shapes(self) -> list[tuple[int, ...]]:
        """Of the first kernel, its bias, the second kernel, and its bias."""
        classes = self.y.shape[1]
        return [(self.x.shape[1], self.hidden), (self.hidden,), (self.hidden, classes), (classes,)]

    def hidden_layer(self, weights: list[np.ndarray], x: np.ndarray) -> np.ndarray:
        """The hidden layer of each run."""
        hidden = x @ weights[0]
        return hidden if self.linear else np.maximum(hidden + weights[1][:, None], 0.0)


def digits() -> Task:
    """The data and the network of examples/quickstart.py."""
    found = curvature.Digits()
    return Task(found.x, found.y, found.x_test, found.y_test, 25, 4, 32, linear=False)


def words(train: pathlib.Path, dev: pathlib.Path) -> Task:
    """10,000 sentences of SST-2, each the mean of the embeddings of its frequent words."""
    from bert_sst2 import read_table  # it imports keras_nlp, which the digits do not need

    sentences, labels = read_table(train)
    kept = np.random.default_rng(0).permutation(len(labels))[:10_000]
    sentences, labels = [sentences[i].split() for i in kept], labels[kept]
    counts = collections.Counter(word for sentence in sentences for word in sentence)
    places = {word: i for i, (word, _) in enumerate(counts.most_common(WORDS))}

    def shares(rows: list[list[str]]) -> np.ndarray:
        found = np.zeros((len(rows), WORDS), np.float32)
        for row, sentence in zip(found, rows, strict=True):
            known = [places[word] for word in sentence if word in places]
            np.add.at(row, known, 1.0 / max(len(known), 1))
        return found

    of_dev, y_test = read_table(dev)
    x_test = shares([sentence.split() for sentence in of_dev])
    y = np.eye(2, dtype=np.float32)[labels]
    return Task(shares(sentences), y, x_test, y_test, 200, 6, EMBEDDING, linear=True)


class Sizes:
    """Mean squares of the coordinates of a trained variable, of rank one, with the noise taken off.

    Args:
        shape: (runs, rows, columns) or (runs, columns).
        least: the least mean square of a row or column.
        most: the largest one.
    """

    def __init__(self, shape: tuple[int, ...], least: float, most: float) -> None:
        self._bounds, self._weight = (least, most), 0.0
        self._means = [np.zeros((shape[0], size)) for size in shape[1:]]

    def update(self, gradient: np.ndarray, noise: np.ndarray) -> None:
        """Adds a noisy gradient, given the variance of the noise of each coordinate."""
        self._weight = DECAY * self._weight + 1.0 - DECAY
        squares = gradient.astype(np.float64) ** 2 - noise
        for axis, mean in enumerate(self._means, start=1):
            others = tuple(i for i in range(1, gradient.ndim) if i != axis)
            mean *= DECAY
            mean += (1.0 - DECAY) * squares.mean(axis=others)

    def scales(self) -> list[np.ndarray]:
        """One factor for each axis; their product is 1 / sqrt(mean square)."""
        first, *others = (np.clip(mean / self._weight, *self._bounds) for mean in self._means)
        return [first**-0.5, *((m / m.mean(axis=1, keepdims=True)) ** -0.5 for m in others)]


def accuracies(
    task: Task, plan: bandmf.TrainingPlan, rate: float, runs: int, bound: float | None
) -> np.ndarray:
    """Returns the test accuracy of each run, `(runs,)`, after DP training by Adam.

    Args:
        task: data and network.
        plan: of the run.
        rate: the learning rate.
        runs: how many.
        bound: how many times larger or smaller than the noise's variance a mean square of a row
            or column may be; None does not scale.
    """
    random = np.random.default_rng(0)
    sizes = [int(np.prod(shape)) for shape in task.shapes]
    weights = [np.zeros((runs, *shape), np.float32) for shape in task.shapes]
    for kernel in (weights[0], weights[2]):
        limit = np.sqrt(6.0 / sum(kernel.shape[1:]))
        limit = 0.05 if task.linear and kernel is weights[0] else limit
        kernel[:] = random.uniform(-limit, limit, kernel.shape)
    noise = curvature.correlated_noise(plan, runs, sum(sizes), random)
    stddev = plan.noise_stddev(CLIP) / plan.batch_size
    variances = stddev**2 * noise_variances(plan.strategy)  # of the noise of each step
    trained = [0, 2, 3] if task.linear else [0, 1, 2, 3]
    known = {}
    if bound is not None:
        usual = variances.mean()
        known = {k: Sizes(weights[k].shape, usual / bound, usual * bound) for k in trained}
    means = [np.zeros_like(weight) for weight in weights]
    squares = [np.zeros_like(weight) for weight in weights]
    for t, (indices, present) in enumerate(curvature.batches(plan, runs, random)):
        scales = [[np.ones((runs, size)) for size in shape] for shape in task.shapes]
        if known and t >= FIRST:
            for k in trained:
                scales[k] = known[k].scales()
            scales = _normalized(scales, trained)
        scales = [[factor.astype(np.float32) for factor in factors] for factors in scales]
        sums = _clipped(task, weights, scales, trained, task.x[indices], task.y[indices], present)
        parts = np.split(noise[t], np.cumsum(sizes)[:-1], axis=1)
        for k in trained:
            scale = _product(scales[k])
            noisy = (sums[k] + parts[k].reshape(sums[k].shape)) / scale / plan.batch_size
            if known:
                known[k].update(noisy, variances[t] / scale.astype(np.float64) ** 2)
            means[k] = BETA_1 * means[k] + (1.0 - BETA_1) * noisy
            squares[k] = BETA_2 * squares[k] + (1.0 - BETA_2) * noisy**2
            root = np.sqrt(squares[k] / (1.0 - BETA_2 ** (t + 1)))
            weights[k] -= rate * means[k] / (1.0 - BETA_1 ** (t + 1)) / (root + EPSILON)
    found = []
    for run in range(runs):
        of_run = [weight[run : run + 1] for weight in weights]
        logits = task.hidden_layer(of_run, task.x_test[None]) @ of_run[2] + of_run[3][:, None]
        found.append(np.mean(logits[0].argmax(axis=1) == task.y_test))
    return np.array(found)


def _normalized(scales: list[list[np.ndarray]], trained: list[int]) -> list[list[np.ndarray]]:
    """Returns scales whose mean square over all coordinates is 1, so that the clip norm fits."""
    total, count = 0.0, 0
    for k in trained:
        total = total + np.prod([(factor**2).sum(axis=1) for factor in scales[k]], axis=0)
        count += int(np.prod([factor.shape[1] for factor in scales[k]]))
    share = np.sqrt(count / total)[:, None]
    return [[factors[0] * share, *factors[1:]] for factors in scales]


def _product(factors: list[np.ndarray]) -> np.ndarray:
    """Returns the scale of each coordinate of a variable."""
    if len(factors) == 1:
        return factors[0]
    return factors[0][:, :, None] * factors[1][:, None, :]


def _clipped(
    task: Task,
    weights: list[np.ndarray],
    scales: list[list[np.ndarray]],
    trained: list[int],
    x: np.ndarray,
    y: np.ndarray,
    present: np.ndarray,
) -> list[np.ndarray]:
    """Returns the sums of scaled gradients that were clipped after they were scaled."""
    hidden = task.hidden_layer(weights, x)
    logits = hidden @ weights[2] + weights[3][:, None]
    d_logits = curvature.logit_gradients(logits, y)
    d_hidden = d_logits @ weights[2].transpose(0, 2, 1)
    if not task.linear:
        d_hidden *= hidden > 0.0
    # Inputs and output gradients of each variable, scaled: a bias has only the latter.
    pairs = [(x, d_hidden), (None, d_hidden), (hidden, d_logits), (None, d_logits)]
    scaled = []
    for (before, after), factors in zip(pairs, scales, strict=True):
        if before is not None:
            before = before * factors[0][:, None]
        scaled.append((before, after * factors[-1][:, None]))
    norms = np.zeros(present.shape, np.float32)
    for k in trained:
        before, after = scaled[k]
        of_input = 1.0 if before is None else np.sum(before**2, axis=2)
        norms += of_input * np.sum(after**2, axis=2)
    factor = present * np.minimum(1.0, CLIP / np.sqrt(np.maximum(norms, 1e-12)))
    sums = []
    for before, after in scaled:
        after = after * factor[:, :, None]
        sums.append(after.sum(axis=1) if before is None else before.transpose(0, 2, 1) @ after)
    return sums


def main() -> None:
    """Plans, trains, prints."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--task", choices=("digits", "words"), default="digits")
    parser.add_argument("--train", type=pathlib.Path, help="SST-2's table, for words")
    parser.add_argument("--dev", type=pathlib.Path, help="SST-2's table, for words")
    parser.add_argument("--epsilon", type=float, default=4.0)
    parser.add_argument("--bands", default="auto", help="1 is DP-SGD")
    parser.add_argument("--runs", type=int, default=12)
    parser.add_argument("--rates", type=float, nargs="+", default=[0.02, 0.04, 0.08, 0.16])
    parser.add_argument("--bounds", type=float, nargs="+", default=[10.0, 3.0])
    options = parser.parse_args()
    task = digits() if options.task == "digits" else words(options.train, options.dev)
    plan = bandmf.TrainingPlan.calibrate(
        num_examples=len(task.x),
        batch_size=task.batch_size,
        epochs=task.epochs,
        epsilon=options.epsilon,
        delta=1e-5,
        num_bands=options.bands if options.bands == "auto" else int(options.bands),
    )
    print(f"{options.task}, epsilon {options.epsilon:g}, {plan.num_bands} bands")
    best = []
    for bound in [None, *options.bounds]:
        found = [
            100.0 * accuracies(task, plan, rate, options.runs, bound) for rate in options.rates
        ]
        cells = "   ".join(
            f"{rate:g}: {curvature.with_error(each)}"
            for rate, each in zip(options.rates, found, strict=True)
        )
        best.append(max(found, key=np.mean))
        gain = curvature.with_error(best[-1] - best[0], "+")
        label = "Adam" if bound is None else f"scaled, bound {bound:g}"
        print(f"{label:<18} {cells}   best to best: {gain}", flush=True)


if __name__ == "__main__":
    main()
