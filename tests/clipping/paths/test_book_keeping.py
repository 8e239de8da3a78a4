"""The book-keeping path itself: what it must not take."""

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import layers

from keras_bandmf.clipping.clipper import Clipper
from keras_bandmf.clipping.factors import Unsupported
from keras_bandmf.clipping.losses import batch_loss
from keras_bandmf.clipping.paths.book_keeping import clip_by_book_keeping


class Branched(layers.Layer):
    """A Dense layer called in a branch of the graph, where no tape outside sees its outputs."""

    def __init__(self, kind):
        super().__init__()
        self.kind = kind
        self.dense = layers.Dense(3)

    def build(self, shape):
        self.dense.build(shape)

    def call(self, x):
        if self.kind == "branch":
            return tf.cond(tf.reduce_sum(x) > -1e9, lambda: self.dense(x), lambda: x)
        if self.kind == "function":
            return tf.function(self.dense, autograph=False)(x)
        return tf.while_loop(
            lambda i, _: i < 1, lambda i, y: (i + 1, self.dense(y)), (tf.constant(0), x)
        )[1]


@pytest.mark.parametrize("kind", ["branch", "function", "loop"])
def test_a_call_inside_a_branch_a_function_or_a_loop_is_not_taken(kind):
    """Its gradient would be found missing, and count as zero: the example would not be clipped."""
    model = keras.Sequential([keras.Input((3,)), Branched(kind), layers.Dense(1)])
    model.compile(loss="mse")
    x, y = np.ones((4, 3), np.float32), np.ones((4, 1), np.float32)

    @tf.function(autograph=False)
    def clip(x, y):
        mask = tf.ones([4], tf.bool)
        return clip_by_book_keeping(
            model, x, y, None, mask, Clipper.of(model), batch_loss(model)
        ).sums

    with pytest.raises(Unsupported, match="inside a loop, a branch or a function"):
        clip(tf.constant(x), tf.constant(y))
