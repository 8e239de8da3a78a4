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
        weights: For each group of variables, shape (batch,): what its gradients are multiplied by.
        norms: Shape (batch,): the norms before clipping, over all variables jointly.
        was_clipped: Shape (batch,), bool: whether a weight of an unmasked example is below one.
    """

    weights: list[tf.Tensor]
    norms: tf.Tensor
    was_clipped: tf.Tensor


class Clipper(NamedTuple):
    """How one model is clipped.

    Attributes:
        mode: The mode that gives the factors.
        groups: The group of every trainable variable.
        clip_norms: The clip norm of every group.
        dtype: The dtype of gradients, norms and sums.
        current_norm: The clip norm of this step, a scalar, for a mode that adapts it.
    """

    mode: ClippingMode
    groups: list[int]
    clip_norms: list[float]
    dtype: tf.DType
    current_norm: tf.Tensor | None = None

    @classmethod
    def of(
        cls,
        model: keras.Model,
        l2_norm_clip: float = 1.0,
        mode: ClippingMode | None = None,
        float64_sums: bool = False,
        current_norm: tf.Tensor | None = None,
    ) -> Clipper:
        """Returns the clipper of `model`'s trainable variables.

        Args:
            model: A built model.
            l2_norm_clip: The clip norm over all groups.
            mode: The mode; flat by default.
            float64_sums: Whether norms and sums are float64 even if no variable is.
            current_norm: See the attribute. None means `l2_norm_clip`.

        Raises:
            ValueError: If the mode does not fit the model.
        """
        mode = mode or FlatClipping()
        groups, shares = mode.variable_groups(model)
        dtype = accumulation_dtype(model.trainable_variables, float64_sums)
        clip_norms = [l2_norm_clip * math.sqrt(share) for share in shares]
        return cls(mode, groups, clip_norms, dtype, current_norm)

    def factors(self, squared_norms: list[tf.Tensor], mask: tf.Tensor) -> Factors:
        """Returns the weights of every example.

        Args:
            squared_norms: Shape (batch,) for each trainable variable that has a gradient, else
                None, in the order of the variables.
            mask: Shape (batch,), bool; False for padding.

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
            factors = self.mode.factors(tf.sqrt(squared), clip_norm, self.current_norm)
            weights.append(tf.where(kept, factors, tf.zeros_like(factors)))
        unclipped = self._unclipped(dtype)
        smaller = functools.reduce(tf.logical_or, [weight < unclipped for weight in weights])
        return Factors(weights, norms, tf.logical_and(mask, smaller))

    def _unclipped(self, dtype: tf.DType) -> tf.Tensor:
        """Returns the weight of a gradient that is not made smaller."""
        if self.current_norm is None:
            return tf.ones([], dtype)
        (clip_norm,) = self.clip_norms
        return clip_norm / tf.cast(self.current_norm, dtype)
