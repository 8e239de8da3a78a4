"""A clipping mode applied to one model: from squared norms to what gradients are multiplied by."""

from __future__ import annotations

import functools
import math
from typing import NamedTuple

import keras
import tensorflow as tf

from keras_bandmf.clipping.modes import ClippingMode, FlatClipping


def accumulation_dtype(variables: list[keras.Variable], float64_sums: bool = False) -> tf.DType:
    """Returns float64 if asked for or if a variable is float64, else float32."""
    wide = float64_sums or any(tf.as_dtype(v.dtype) == tf.float64 for v in variables)
    return tf.float64 if wide else tf.float32


class Factors(NamedTuple):
    """What clipping does to every example.

    Attributes:
        weights: one tensor (batch,) per group of variables: what its gradients are multiplied by.
        norms: (batch,) norms before clipping, over all variables jointly.
        was_clipped: (batch,) bool, whether any weight of an unmasked example is below one.
    """

    weights: list[tf.Tensor]
    norms: tf.Tensor
    was_clipped: tf.Tensor


class Clipper(NamedTuple):
    """How one model is clipped.

    Attributes:
        mode: of the factors.
        groups: the group of every trainable variable.
        clip_norms: of every group.
        dtype: of gradients, norms and sums.
    """

    mode: ClippingMode
    groups: list[int]
    clip_norms: list[float]
    dtype: tf.DType

    @classmethod
    def of(
        cls,
        model: keras.Model,
        l2_norm_clip: float = 1.0,
        mode: ClippingMode | None = None,
        float64_sums: bool = False,
    ) -> Clipper:
        """Returns the clipper of `model`'s trainable variables.

        Args:
            model: built.
            l2_norm_clip: clip norm over all groups.
            mode: flat by default.
            float64_sums: whether norms and sums are float64 even if no variable is.

        Raises:
            ValueError: the mode does not fit the model.
        """
        mode = mode or FlatClipping()
        groups, shares = mode.variable_groups(model)
        dtype = accumulation_dtype(model.trainable_variables, float64_sums)
        return cls(mode, groups, [l2_norm_clip * math.sqrt(share) for share in shares], dtype)

    def factors(self, squared_norms: list[tf.Tensor], mask: tf.Tensor) -> Factors:
        """Returns the weights of every example.

        Args:
            squared_norms: a tensor (batch,) for each trainable variable that has a gradient, else
                None, in the order of the variables.
            mask: (batch,) bool, False for padding.

        Formal guarantees: weight times norm is at most the clip norm of the group. Every weight of
        an example is exactly zero if it is masked out or its gradient is not finite in any group.
        """
        dtype = next((s.dtype for s in squared_norms if s is not None), tf.float32)
        by_group = [tf.zeros(tf.shape(mask), dtype) for _ in self.clip_norms]
        for group, squared in zip(self.groups, squared_norms, strict=True):
            if squared is not None:
                by_group[group] += squared
        norms = tf.sqrt(tf.add_n(by_group))
        kept = tf.logical_and(mask, tf.math.is_finite(norms))
        weights = []
        for squared, clip_norm in zip(by_group, self.clip_norms, strict=True):
            factors = self.mode.factors(tf.sqrt(squared), clip_norm)
            weights.append(tf.where(kept, factors, tf.zeros_like(factors)))
        smaller = functools.reduce(tf.logical_or, [weight < 1 for weight in weights])
        return Factors(weights, norms, tf.logical_and(mask, smaller))
