"""The seeds of dropout masks and other random numbers of a private forward pass.

Keras's layers draw by `keras.random.*(seed=generator)`, which asks a `SeedGenerator` for its next
seed. For the time of a private pass every generator of the model is answered by a function of a
secret key and of the place of the draw in the run. No variable is read or written for it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
from collections.abc import Callable, Iterator
from typing import Any

import keras
import tensorflow as tf

from keras_bandmf._keras_internals import (
    all_layers,
    existing_global_seed_generator,
    global_seed_generator,
    own_seed_generators,
)
from keras_bandmf.clipping.checks.captures import Refused
from keras_bandmf.clipping.factors import Unsupported

# A seed has 64 bits: 28 number steps and replicas, 26 the rows of a batch, 10 the draws of a pass.
STEP_BITS = 28
_ROW_BITS = 26
_DRAW_BITS = 10
_HALF_BITS = (STEP_BITS + _ROW_BITS) // 2
_ROUNDS = 4
_PHILOX = 1  # the number of the algorithm in TensorFlow's operations


@dataclasses.dataclass(frozen=True)
class MaskSeeds:
    """Where the random numbers of one step, on one replica, come from.

    Formal guarantees:
        Given a uniformly random secret `key`, every draw of every pass of a run has a seed of its
        own: the seed is a permutation (a Feistel network) of (step, replica, first row of the
        pass), followed by the number of the draw within the pass. TensorFlow maps distinct seeds
        to distinct (key, counter) pairs of Philox, or distinct keys of ThreeFry where XLA takes
        that. So no two draws of a run use the same random bits. That bits under distinct keys or
        counters are independent of each other for whoever does not know the key of the run is an
        assumption, the same as that of the noise; a seed has 54 secret bits beside the number of
        the draw, and finding one tells nothing simple about others.

        Then the masks add nothing to what the mechanism reveals. A pass draws tensors with the
        example on axis 0 whose rows are independent and of one law (or one value for all rows). So
        the masks of all rows but one have the same joint law whether or not that row is there,
        whatever places the others stand at, and are independent of data, noise and other steps.
        Couple both worlds so that every other row has the same masks in both: the clipped sums
        then differ by the row's own clipped gradient. So for each value of the masks the run is
        the mechanism that is accounted for, and a mixture of such pairs, with weights that are the
        same in both worlds, is no easier to tell apart (hockey-stick divergences are jointly
        convex).

        This fails for numbers whose law depends on the number or the order of the rows, such as a
        permutation of the batch: such layers mix rows and are refused for that. `captures` refuses
        random operations whose seed does not come from here.

    Attributes:
        key: Shape (2,), int64 or uint64: the secret key of the run. It is read from a variable,
            and never a constant of the graph.
        place: Scalar int64, step * replicas + replica: below 2**28.

    Example:
        >>> import tensorflow as tf
        >>> from keras_bandmf import clipping
        >>> key = tf.constant([1, 2], tf.int64)  # of a real run: secret and random
        >>> first, second = (clipping.MaskSeeds(key, tf.constant(t, tf.int64)) for t in (0, 1))
        >>> bool(first.of_pass(0) == second.of_pass(0))
        False
    """

    key: tf.Tensor
    place: tf.Tensor

    def of_pass(self, first_row: Any) -> tf.Tensor:
        """Returns the seed of the first draw of a pass, scalar uint64; the others follow it.

        Args:
            first_row: Scalar integer below 2**26, the first row of the pass in its batch.
        """
        key = tf.bitcast(self.key, tf.uint64)
        number = _left(tf.cast(self.place, tf.uint64), _ROW_BITS) + tf.cast(first_row, tf.uint64)
        low = tf.constant(2**_HALF_BITS - 1, tf.uint64)
        left = tf.bitwise.right_shift(number, tf.constant(_HALF_BITS, tf.uint64))
        right = tf.bitwise.bitwise_and(number, low)
        for turn in range(_ROUNDS):
            counter = tf.stack([right + tf.constant(turn << 32, tf.uint64), key[1]])
            word = tf.raw_ops.StatelessRandomUniformFullIntV2(
                shape=[1], key=key[:1], counter=counter, alg=_PHILOX, dtype=tf.uint32
            )
            word = tf.bitwise.bitwise_and(tf.cast(word[0], tf.uint64), low)
            left, right = right, tf.bitwise.bitwise_xor(left, word)
        return with_room_for_draws(_left(left, _HALF_BITS) + right)


def with_room_for_draws(number: tf.Tensor) -> tf.Tensor:
    """Returns a number as the seed of a first draw, whose low bits number the draws that follow.

    Args:
        number: uint64; its upper bits are shifted out.
    """
    return _left(number, _DRAW_BITS)


def _left(value: tf.Tensor, bits: int) -> tf.Tensor:
    return tf.bitwise.left_shift(value, tf.constant(bits, tf.uint64))


def seed_generators(model: keras.layers.Layer) -> list[keras.random.SeedGenerator]:
    """Returns every generator that is an attribute of a layer of `model`, and Keras's global one.

    Keras makes that one on first use. A replica cannot make it; `check_model` does.
    """
    if not tf.distribute.has_strategy():
        # Where it cannot be made, a draw from it is refused: it would write its new variable.
        with contextlib.suppress(RuntimeError), tf.init_scope():
            global_seed_generator()
    shared = existing_global_seed_generator()
    found = [] if shared is None else [shared]
    for layer in all_layers(model):
        found += own_seed_generators(layer)
    return list({id(generator): generator for generator in found}.values())


@contextlib.contextmanager
def drawing(model: keras.layers.Layer, first: tf.Tensor) -> Iterator[None]:
    """Makes every seed generator of `model`, on its instance, answer with one pass's seeds.

    Args:
        model: The model whose forward pass, loss and gradients are computed inside. All of them
            must be, because a layer that recomputes its activations draws again.
        first: The seed of `MaskSeeds.of_pass`.

    Raises:
        Refused: If a generator's `next` is replaced already; and, from inside, for a draw in a
            loop or an inner function, where one seed would serve for many draws, or more draws
            than a pass may have.
    """
    answer = _answer(first)
    replaced = []
    try:
        for generator in seed_generators(model):
            if "next" in vars(generator):
                raise Refused(
                    "The `next` of a seed generator is replaced already, so that its seeds are "
                    f"not those of the run. Received: seed generator '{generator.name}'"
                )
            vars(generator)["next"] = answer
            replaced.append(generator)
        yield
    finally:
        for generator in replaced:
            del vars(generator)["next"]


@contextlib.contextmanager
def without_draws(layer: keras.layers.Layer) -> Iterator[None]:
    """Makes every draw from a seed generator of `layer`, or from Keras's global one, an error.

    For a layer that runs a second time on the same inputs: it would draw other numbers.

    Args:
        layer: The layer that runs inside.

    Raises:
        Unsupported: From inside, for a draw.
    """

    def refuse(ordered: bool = True) -> tf.Tensor:
        raise Unsupported(f"{layer.path}: it has no clipping rule and draws random numbers")

    generators = seed_generators(layer)
    before = [vars(generator).get("next") for generator in generators]
    try:
        for generator in generators:
            vars(generator)["next"] = refuse
        yield
    finally:
        for generator, answer in zip(generators, before, strict=True):
            if answer is None:
                del vars(generator)["next"]
            else:
                vars(generator)["next"] = answer


def _answer(first: tf.Tensor) -> Callable[..., tf.Tensor]:
    graph = _graph()
    numbers = itertools.count()

    def answer(ordered: bool = True) -> tf.Tensor:
        _refuse_inner(graph)
        number = next(numbers)
        if number >= 2**_DRAW_BITS:
            raise Refused(
                "A forward pass may draw random numbers at most "
                f"{2**_DRAW_BITS} times. Received: a model with more draws"
            )
        # int32, because Keras passes it on unchanged. It drops bits of other types.
        return tf.bitcast(first + tf.constant(number, tf.uint64), tf.int32)

    return answer


def _graph() -> tf.Graph | None:
    return None if tf.executing_eagerly() else tf.compat.v1.get_default_graph()


def _refuse_inner(graph: tf.Graph | None) -> None:
    """Refuses draws outside the pass itself and its branches, which run at most once."""
    here = _graph()
    while here is not None and here is not graph and type(here).__name__ == "CondBranchFuncGraph":
        here = here.outer_graph
    if here is not graph:
        raise Refused(
            "Random numbers are drawn inside a loop or an inner `tf.function`, which would use one "
            "seed many times. Draw them before it, or unroll the loop (`unroll=True` of a "
            f"recurrent layer). Received: a draw in '{getattr(here, 'name', 'eager code')}'"
        )
