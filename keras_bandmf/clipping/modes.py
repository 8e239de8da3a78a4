"""Clipping modes: how the gradient of an example is brought to a norm of at most the clip norm."""

from __future__ import annotations

import dataclasses
import math
import numbers
from collections.abc import Mapping
from typing import Any, Literal

import keras
import tensorflow as tf

from keras_bandmf._checks import checked_float
from keras_bandmf._keras_internals import own_trainable_variables, trained_layers
from keras_bandmf._printed import rounded_up
from keras_bandmf.clipping.norms import LARGEST_CLIP_NORM

# Below this norm automatic clipping no longer scales up to the clip norm: squares of smaller
# gradients may vanish in float32 (up to norms of 1e-7 in each variable), and a norm found too small
# would let an example count for more.
_LEAST_NORM = 1e-4

# The adaptive clip norm stays within this factor of the one it begins at.
_LARGEST_CHANGE = 1024.0
# What a gradient adds to the count of small ones, and which are small, as shares of the clip norm.
# The squares add up to less than one: a gradient that is counted leaves room for the count.
COUNT_SHARE, SMALL_SHARE = 0.3, 0.95


def _shown(norm: float) -> str:
    """Returns a clip norm or a sensitivity as the statement prints it: rounded up."""
    return rounded_up(norm, 6)


@dataclasses.dataclass(frozen=True)
class ClippingMode:
    """The base class of the clipping modes. Use one of its subclasses.

    Formal guarantees: in every mode the contribution of one example to the clipped sum has a norm
    of at most `sensitivity(l2_norm_clip)` over all trainable variables jointly, so one noise scaled
    to it serves all of them.

    Example:
        >>> import keras_bandmf as bandmf
        >>> mode = bandmf.clipping.AutomaticClipping(gamma=0.1)
        >>> isinstance(mode, bandmf.clipping.ClippingMode)
        True
        >>> mode.sensitivity(l2_norm_clip=0.5)
        0.5
    """

    def sensitivity(self, l2_norm_clip: float) -> float:
        """Returns the largest norm of one example's contribution: what the noise is scaled to.

        Args:
            l2_norm_clip: The clip norm.
        """
        return l2_norm_clip

    def least_norm(self, l2_norm_clip: float) -> float:
        """Returns the smallest gradient norm whose contribution may reach the sensitivity.

        Args:
            l2_norm_clip: The clip norm.
        """
        return l2_norm_clip

    def variable_groups(self, model: keras.Model) -> tuple[list[int], list[float]]:
        """Returns which variables are clipped together.

        Args:
            model: A built model.

        Returns:
            (The group of each trainable variable, the share of each group.) The clip norm of a
            group is `l2_norm_clip` times the square root of its share. The shares add up to one.

        Raises:
            ValueError: If the mode does not fit the model.
        """
        return [0] * len(model.trainable_variables), [1.0]

    def factors(
        self, norms: tf.Tensor, clip_norm: float, current_norm: tf.Tensor | None = None
    ) -> tf.Tensor:
        """Returns what the gradients of one group are multiplied by: min(1, clip_norm / norm).

        Args:
            norms: Shape (batch,), the norms of the group's gradients. One that is not finite may
                get any factor.
            clip_norm: The clip norm of the group.
            current_norm: The clip norm of the step, a scalar, for `AdaptiveClipping` alone.

        Returns:
            Shape (batch,), with factor * norm <= clip_norm, and never NaN for a finite norm.
        """
        return tf.minimum(tf.ones_like(norms), clip_norm / norms)

    def describe(self, l2_norm_clip: float) -> str:
        """Returns the mode and its sensitivity in words, for the statement.

        Args:
            l2_norm_clip: The clip norm.
        """
        raise NotImplementedError

    def get_config(self) -> dict[str, Any]:
        """Returns the config for Keras's serialization."""
        return dataclasses.asdict(self)

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> ClippingMode:
        """Returns the mode with a config from `get_config`."""
        return cls(**config)


@keras.saving.register_keras_serializable(package="keras_bandmf")
@dataclasses.dataclass(frozen=True)
class FlatClipping(ClippingMode):
    """Clips by one norm over all trainable variables: the factor is min(1, clip / norm).

    This is the clipping of DP-SGD (Abadi et al., 2016, algorithm 1), and the default.

    Example:
        >>> import keras_bandmf as bandmf
        >>> bandmf.clipping.FlatClipping().factors(2.0, clip_norm=1.0).numpy().item()
        0.5
    """

    def describe(self, l2_norm_clip: float) -> str:
        """Returns the mode and its sensitivity in words, for the statement."""
        return (
            "flat: an example's gradient over all variables is scaled down to norm "
            f"{_shown(l2_norm_clip)} at most; sensitivity {_shown(self.sensitivity(l2_norm_clip))}"
        )


@keras.saving.register_keras_serializable(package="keras_bandmf")
@dataclasses.dataclass(frozen=True)
class PerLayerClipping(ClippingMode):
    """Clips each layer's part of a gradient by itself (McMahan et al., 2018).

    The squared clip norms of the layers add up to the square of the optimizer's. Layer g gets
    c_g = clip * sqrt(share_g / sum of shares), by default clip / sqrt(number of layers). The whole
    contribution has norm sqrt(sum c_g^2) = clip at most, so noise and privacy are those of flat
    clipping. A layer here is one that owns trainable variables: `clipping.explain` lists their
    paths. A variable that two layers share belongs to the first of them.

    Args:
        shares: A mapping from the path of a layer, or from its name where that is unique, to its
            positive share of the squared clip norm. Layers that are not named have share 1. With
            None all layers have equal shares.

    Raises:
        ValueError: If `shares` is not such a mapping.

    Example:
        An embedding gets a share of 4, hence twice the clip norm of the other layer.

        >>> import keras
        >>> import keras_bandmf as bandmf
        >>> mode = bandmf.clipping.PerLayerClipping({"embedding": 4.0})
        >>> layers = [keras.layers.Embedding(9, 2, name="embedding"), keras.layers.Dense(1)]
        >>> model = keras.Sequential([keras.Input((3,), dtype="int32"), *layers])
        >>> mode.variable_groups(model)
        ([0, 1, 1], [0.8, 0.2])
    """

    shares: Mapping[str, float] | tuple[tuple[str, float], ...] | None = None

    def __post_init__(self) -> None:
        shares = {} if self.shares is None else self.shares
        pairs = sorted(shares.items()) if isinstance(shares, Mapping) else shares
        fits = isinstance(pairs, (list, tuple)) and all(
            isinstance(pair, (list, tuple))
            and len(pair) == 2
            and isinstance(pair[0], str)
            and _is_number(pair[1])
            and pair[1] > 0
            for pair in pairs
        )
        if not fits:
            raise ValueError(
                "Expected `shares` to map paths of layers to positive finite numbers, their shares "
                f"of the squared clip norm. Received: shares={self.shares!r}"
            )
        # Pairs instead of a dict, because modes are compared and hashed.
        object.__setattr__(self, "shares", tuple((name, float(share)) for name, share in pairs))

    def variable_groups(self, model: keras.Model) -> tuple[list[int], list[float]]:
        """Returns a group for each layer that owns trainable variables, and its share.

        Raises:
            ValueError: If a name in `shares` does not stand for exactly one such layer.
        """
        layers = trained_layers(model)
        owner: dict[int, int] = {}
        for i, layer in enumerate(layers):
            for variable in own_trainable_variables(layer):
                owner.setdefault(id(variable), i)
        owners = [owner[id(variable)] for variable in model.trainable_variables]
        used = sorted(set(owners))
        shares = self._shares_of([layers[i] for i in used])
        total = math.fsum(shares)
        return [used.index(i) for i in owners], [share / total for share in shares] or [1.0]

    def _shares_of(self, layers: list[keras.layers.Layer]) -> list[float]:
        shares: list[float | None] = [None] * len(layers)
        for name, share in self._pairs:
            found = [i for i, layer in enumerate(layers) if name in (layer.path, layer.name)]
            if len(found) != 1 or shares[found[0]] is not None:
                raise ValueError(
                    "Expected `shares` to name each layer at most once, by its path or by a name "
                    "that no other layer has, and only layers with trainable variables: "
                    f"{', '.join(layer.path for layer in layers)}. Received: {name!r}, which fits "
                    f"{len(found)} layers{' that are already named' if len(found) == 1 else ''}"
                )
            shares[found[0]] = share
        return [1.0 if share is None else share for share in shares]

    def describe(self, l2_norm_clip: float) -> str:
        """Returns the mode, the shares and the sensitivity in words, for the statement."""
        split = "equal shares"
        if self._pairs:
            named = ", ".join(f"{name} {share:g}" for name, share in self._pairs)
            split = f"shares {named}, any other layer 1"
        return (
            "per layer: each layer's part of an example's gradient is scaled down to the layer's "
            f"own clip norm ({split}), the squares adding up to that of {_shown(l2_norm_clip)}; "
            f"sensitivity {_shown(self.sensitivity(l2_norm_clip))}"
        )

    def get_config(self) -> dict[str, Any]:
        """Returns the shares, for Keras's serialization."""
        return {"shares": dict(self._pairs) or None}

    @property
    def _pairs(self) -> tuple[tuple[str, float], ...]:
        """The shares in the form that `__post_init__` gave them."""
        return self.shares if isinstance(self.shares, tuple) else ()


@keras.saving.register_keras_serializable(package="keras_bandmf")
@dataclasses.dataclass(frozen=True)
class AutomaticClipping(ClippingMode):
    """Normalizes every gradient: the factor is clip / (norm + gamma) (Bu et al., arXiv 2206.07136).

    The clip norm then only scales the learning rate and needs no tuning. `gamma=0` gives
    clip / norm. Gradients of norm below 1e-4 are scaled as if their norm were 1e-4, and a zero
    gradient contributes zero.

    Args:
        gamma: The stability constant, at least 0, of the order of small gradient norms.

    Raises:
        TypeError: If `gamma` is not a number.
        ValueError: If it is negative or not finite.

    Example:
        >>> import keras_bandmf as bandmf
        >>> mode = bandmf.clipping.AutomaticClipping(gamma=0.5)
        >>> mode.factors(1.5, clip_norm=1.0).numpy().item()
        0.5
    """

    gamma: float = 0.01

    def __post_init__(self) -> None:
        hint = "It is added to the norm that an example's gradient is divided by."
        gamma = checked_float("gamma", self.gamma, minimum=0.0, hint=hint)
        object.__setattr__(self, "gamma", gamma)

    def least_norm(self, l2_norm_clip: float) -> float:
        """Returns gamma, or 1e-4 if that is larger: a smaller norm is not scaled up to the clip."""
        return max(self.gamma, _LEAST_NORM)

    def factors(
        self, norms: tf.Tensor, clip_norm: float, current_norm: tf.Tensor | None = None
    ) -> tf.Tensor:
        """Returns clip_norm / (norm + gamma), with the denominator at least 1e-4."""
        return clip_norm / tf.maximum(norms + self.gamma, _LEAST_NORM)

    def describe(self, l2_norm_clip: float) -> str:
        """Returns the mode and its sensitivity in words, for the statement."""
        added = f" + {self.gamma:g}" if self.gamma else ""
        return (
            f"automatic: an example's gradient is multiplied by {_shown(l2_norm_clip)} / (its norm"
            f"{added}), whatever its size; sensitivity {_shown(self.sensitivity(l2_norm_clip))}"
        )


@keras.saving.register_keras_serializable(package="keras_bandmf")
@dataclasses.dataclass(frozen=True)
class AdaptiveClipping(ClippingMode):
    """Clips at a norm that follows the norms of the gradients, at no cost in privacy.

    The clip norm c begins at `l2_norm_clip`. After each step it is multiplied by
    exp(-learning_rate * (f - target_unclipped_quantile)) (Andrew et al., arXiv 1905.03871), where f
    is the noisy share of the examples with a gradient of norm at most 0.95 c. So it settles where
    that share is the target. It stays within a factor of 1024 of `l2_norm_clip`.

    The count that f comes from is one more coordinate of the clipped sum, with the same noise. In
    place of its gradient g clipped to norm c, an example adds `l2_norm_clip / max(c, |g|) * g`, and
    0.3 * `l2_norm_clip` to the count if |g| is at most 0.95 c, and not zero. A gradient that is
    counted is short enough to leave room for that, so all others keep their full norm. (Room of
    this kind is used by SlaClip, too, for a histogram of norms.) After the noise the sum is
    multiplied by c / `l2_norm_clip`. Where many gradients are exactly zero, as with a hinge loss,
    choose a target below the share of those that are not, or c grows to its bound.

    Formal guarantees:
        Whatever c is, an example adds a vector of norm at most `l2_norm_clip`, count included:
        where it is counted, sqrt(0.95^2 + 0.3^2) < 1 times that. One that is left out, or whose
        gradient is zero, adds nothing, so neighbors differ by no more in either adjacency. (A row
        that is blanked by a weight of zero may still be counted if its activations have a norm
        above 10^6, beside which float32 cannot tell a zero.) The noise is scaled to
        `l2_norm_clip` once and for all. c is computed from earlier noisy sums alone
        (post-processing), so it may be published, too; and the mechanism is the one that the plan
        accounts for, whose gradients may depend on what was released before.

    Args:
        target_unclipped_quantile: The share of examples that are to be below 0.95 c, above 0 and
            below 1.
        learning_rate: How fast c moves, above 0: by a factor of exp(learning_rate) at most in a
            step, but for the noise.

    Raises:
        TypeError: If an argument is not a number.
        ValueError: If an argument is out of range.

    Example:
        >>> import keras_bandmf as bandmf
        >>> mode = bandmf.clipping.AdaptiveClipping(target_unclipped_quantile=0.7)
        >>> mode.factors([1.0, 4.0], clip_norm=1.0, current_norm=2.0).numpy()
        array([0.5 , 0.25], dtype=float32)
    """

    target_unclipped_quantile: float = 0.5
    learning_rate: float = 0.2

    def __post_init__(self) -> None:
        target = checked_float(
            "target_unclipped_quantile",
            self.target_unclipped_quantile,
            above=0.0,
            below=1.0,
            hint="It is a share of the examples.",
        )
        object.__setattr__(self, "target_unclipped_quantile", target)
        hint = "It is how fast the clip norm moves."
        rate = checked_float("learning_rate", self.learning_rate, above=0.0, hint=hint)
        object.__setattr__(self, "learning_rate", rate)

    def least_norm(self, l2_norm_clip: float) -> float:
        """Returns the smallest value of the clip norm."""
        return min(l2_norm_clip, max(l2_norm_clip / _LARGEST_CHANGE, _LEAST_NORM))

    def largest_norm(self, l2_norm_clip: float) -> float:
        """Returns the largest value of the clip norm.

        Args:
            l2_norm_clip: The clip norm that a run begins with.
        """
        return max(l2_norm_clip, min(l2_norm_clip * _LARGEST_CHANGE, LARGEST_CLIP_NORM))

    def factors(
        self, norms: tf.Tensor, clip_norm: float, current_norm: tf.Tensor | None = None
    ) -> tf.Tensor:
        """Returns clip_norm / max(current_norm, norm); `current_norm` is clip_norm if left out."""
        norms = tf.convert_to_tensor(norms)
        current = clip_norm if current_norm is None else current_norm
        return clip_norm / tf.maximum(norms, tf.cast(current, norms.dtype))

    def count(
        self, norms: tf.Tensor, mask: tf.Tensor, clip_norm: float, current_norm: tf.Tensor
    ) -> tf.Tensor:
        """Returns what a batch adds to the count of small gradients, before the noise.

        Args:
            norms: Shape (examples,), the norms that `factors` was given.
            mask: Shape (examples,), bool; False for padding.
            clip_norm: The clip norm that the run began with.
            current_norm: The clip norm of the step, a scalar.

        Returns:
            A scalar, float64: 0.3 times `clip_norm` for each small gradient.
        """
        # A norm that is not finite is not below anything, and such an example counts nowhere. Nor
        # does a gradient of zero: a blanked example must be the same as none.
        small = (norms > 0) & (norms <= SMALL_SHARE * tf.cast(current_norm, norms.dtype))
        number = tf.reduce_sum(tf.cast(tf.logical_and(mask, small), tf.float64))
        return COUNT_SHARE * clip_norm * number

    def next_norm(
        self, current_norm: tf.Tensor, share: tf.Tensor, l2_norm_clip: float
    ) -> tf.Tensor:
        """Returns the clip norm of the next step.

        Args:
            current_norm: The clip norm of this step, a scalar, float32.
            share: The noisy share of small gradients, a scalar. If it is NaN, because the step was
                not allowed, the clip norm stays.
            l2_norm_clip: The clip norm that the run began with.
        """
        error = tf.cast(share, current_norm.dtype) - self.target_unclipped_quantile
        moved = current_norm * tf.exp(-self.learning_rate * error)
        # In float32 the bounds themselves may be rounded outwards.
        least = self.least_norm(l2_norm_clip) * (1.0 + 2.0**-20)
        largest = self.largest_norm(l2_norm_clip) * (1.0 - 2.0**-20)
        moved = tf.clip_by_value(moved, least, largest)
        kept = tf.math.is_finite(share) & tf.math.is_finite(moved)
        return tf.where(kept, moved, current_norm)

    def describe(self, l2_norm_clip: float) -> str:
        """Returns the mode and its sensitivity in words, for the statement."""
        return (
            f"adaptive: an example's gradient is multiplied by {_shown(l2_norm_clip)} / max(its "
            f"norm, a clip norm that begins at {_shown(l2_norm_clip)} and follows the "
            f"{self.target_unclipped_quantile:g} quantile of the norms, whose noisy count is "
            f"a coordinate of the sum); sensitivity {_shown(self.sensitivity(l2_norm_clip))}"
        )


#: The modes that a string stands for.
ClippingName = Literal["flat", "per_layer", "automatic", "adaptive"]

_BY_NAME: dict[str, type[ClippingMode]] = {
    "flat": FlatClipping,
    "per_layer": PerLayerClipping,
    "automatic": AutomaticClipping,
    "adaptive": AdaptiveClipping,
}


def checked_mode(clipping: Any) -> ClippingMode:
    """Returns the clipping mode that an argument `clipping` stands for.

    Args:
        clipping: "flat", "per_layer", "automatic", "adaptive", or a mode.

    Returns:
        The mode, with default settings for a name.

    Raises:
        ValueError: If it is neither.

    Example:
        >>> import keras_bandmf as bandmf
        >>> bandmf.clipping.checked_mode("automatic")
        AutomaticClipping(gamma=0.01)
    """
    if isinstance(clipping, str) and clipping in _BY_NAME:
        return _BY_NAME[clipping]()
    # A subclass is refused: nothing says that it bounds a norm.
    if type(clipping) in _BY_NAME.values():
        return clipping
    raise ValueError(
        'Expected `clipping` to be "flat", "per_layer", "automatic", "adaptive", or one of '
        "clipping.FlatClipping(), clipping.PerLayerClipping(shares), "
        "clipping.AutomaticClipping(gamma) and "
        "clipping.AdaptiveClipping(target_unclipped_quantile, learning_rate). "
        f"Received: clipping={clipping!r}"
    )


def _is_number(value: Any) -> bool:
    real = isinstance(value, numbers.Real) and not isinstance(value, bool)
    return real and math.isfinite(value)
