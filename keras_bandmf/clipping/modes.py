"""Clipping modes: how an example's gradient is brought to a norm of at most the clip norm."""

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

# Below this norm automatic clipping no longer scales up to the clip norm: squares of smaller
# gradients may vanish in float32 (up to norms of 1e-7 in each variable), and a norm found too small
# would let an example count for more.
_LEAST_NORM = 1e-4


def _shown(norm: float) -> str:
    """A clip norm or a sensitivity as the statement prints it: rounded up."""
    return rounded_up(norm, 6)


@dataclasses.dataclass(frozen=True)
class ClippingMode:
    """Base of the clipping modes; use one of its subclasses.

    Formal guarantees: in every mode the contribution of one example to the clipped sum has a norm
    of at most `sensitivity(l2_norm_clip)` over all trainable variables jointly, so one noise scaled
    to it serves all of them.
    """

    def sensitivity(self, l2_norm_clip: float) -> float:
        """The largest norm of one example's contribution: what the noise is scaled to."""
        return l2_norm_clip

    def least_norm(self, l2_norm_clip: float) -> float:
        """The smallest norm at which a contribution may reach `sensitivity(l2_norm_clip)`."""
        return l2_norm_clip

    def variable_groups(self, model: keras.Model) -> tuple[list[int], list[float]]:
        """How the variables are clipped together.

        Args:
            model: built.

        Returns:
            (group of each trainable variable, share of each group): the clip norm of a group is
            `l2_norm_clip` times the root of its share, and the shares add up to one.

        Raises:
            ValueError: the mode does not fit the model.
        """
        return [0] * len(model.trainable_variables), [1.0]

    def factors(self, norms: tf.Tensor, clip_norm: float) -> tf.Tensor:
        """What the gradients of one group are multiplied by: min(1, clip / norm).

        Args:
            norms: (batch,) norms of the group's gradients; one that is not finite may get any
                factor.
            clip_norm: of the group.

        Returns:
            (batch,) factors with factor * norm <= clip_norm, and never NaN for a finite norm.
        """
        return tf.minimum(tf.ones_like(norms), clip_norm / norms)

    def describe(self, l2_norm_clip: float) -> str:
        """The mode and its sensitivity in words, for the statement."""
        raise NotImplementedError

    def get_config(self) -> dict[str, Any]:
        """The config, as Keras's serialization wants it."""
        return dataclasses.asdict(self)

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> ClippingMode:
        """Makes a mode from what `get_config` returned."""
        return cls(**config)


@keras.saving.register_keras_serializable(package="keras_bandmf")
@dataclasses.dataclass(frozen=True)
class FlatClipping(ClippingMode):
    """One norm over all trainable variables: factor min(1, clip / norm) (Abadi et al., 2016)."""

    def describe(self, l2_norm_clip: float) -> str:
        return (
            "flat: an example's gradient over all variables is scaled down to norm "
            f"{_shown(l2_norm_clip)} at most; sensitivity {_shown(self.sensitivity(l2_norm_clip))}"
        )


@keras.saving.register_keras_serializable(package="keras_bandmf")
@dataclasses.dataclass(frozen=True)
class PerLayerClipping(ClippingMode):
    """Each layer's part of a gradient is clipped by itself (McMahan et al., 2018).

    The squared clip norms of the layers add up to that of the optimizer: layer g gets
    c_g = clip * sqrt(share_g / sum of shares), by default clip / sqrt(number of layers). The whole
    contribution has norm sqrt(sum c_g^2) = clip at most, so noise and privacy are those of flat
    clipping. A layer here is one that owns trainable variables: `clipping.explain` lists their
    paths. A variable that two layers share belongs to the first of them.

    Args:
        shares: path of a layer, or its name where that is unique -> its positive share of the
            squared clip norm; layers that are not named have share 1. None: all alike.

    Example:

    ```python
    clipping = keras_bandmf.clipping.PerLayerClipping({"embedding": 4.0})  # twice the clip norm
    optimizer = keras_bandmf.BandMFOptimizer("adam", plan, l2_norm_clip=1.0, clipping=clipping)
    ```
    """

    shares: Mapping[str, float] | tuple[tuple[str, float], ...] | None = None

    def __post_init__(self) -> None:
        shares = {} if self.shares is None else self.shares
        pairs = sorted(shares.items()) if isinstance(shares, Mapping) else shares
        fits = isinstance(pairs, (list, tuple)) and all(
            isinstance(name, str) and _is_number(share) and share > 0 for name, share in pairs
        )
        if not fits:
            raise ValueError(
                "`shares` must map paths of layers to positive finite numbers, their shares of the "
                f"squared clip norm. Received: shares={self.shares!r}"
            )
        # Pairs, not a dict: modes are compared and hashed.
        object.__setattr__(self, "shares", tuple((name, float(share)) for name, share in pairs))

    def variable_groups(self, model: keras.Model) -> tuple[list[int], list[float]]:
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
                    "`shares` must name each layer once, by its path or a name no other layer has, "
                    "and only layers with trainable variables: "
                    f"{', '.join(layer.path for layer in layers)}. Received: {name!r}, which fits "
                    f"{len(found)} layers{' named already' if len(found) == 1 else ''}"
                )
            shares[found[0]] = share
        return [1.0 if share is None else share for share in shares]

    def describe(self, l2_norm_clip: float) -> str:
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
        return {"shares": dict(self._pairs) or None}

    @property
    def _pairs(self) -> tuple[tuple[str, float], ...]:
        """`shares` as `__post_init__` left it."""
        return self.shares if isinstance(self.shares, tuple) else ()


@keras.saving.register_keras_serializable(package="keras_bandmf")
@dataclasses.dataclass(frozen=True)
class AutomaticClipping(ClippingMode):
    """Every gradient is normalised: factor clip / (norm + gamma) (Bu et al., arXiv 2206.07136).

    The clip norm then only scales the learning rate and needs no tuning. `gamma=0` gives
    clip / norm; gradients of norm below 1e-4 are scaled as if their norm were 1e-4, and a zero
    gradient contributes zero.

    Args:
        gamma: stability constant, at least 0, of the order of small gradient norms.
    """

    gamma: float = 0.01

    def __post_init__(self) -> None:
        hint = "It is added to the norm that an example's gradient is divided by."
        gamma = checked_float("gamma", self.gamma, minimum=0.0, hint=hint)
        object.__setattr__(self, "gamma", gamma)

    def least_norm(self, l2_norm_clip: float) -> float:
        return max(self.gamma, _LEAST_NORM)

    def factors(self, norms: tf.Tensor, clip_norm: float) -> tf.Tensor:
        return clip_norm / tf.maximum(norms + self.gamma, _LEAST_NORM)

    def describe(self, l2_norm_clip: float) -> str:
        added = f" + {self.gamma:g}" if self.gamma else ""
        return (
            f"automatic: an example's gradient is multiplied by {_shown(l2_norm_clip)} / (its norm"
            f"{added}), whatever its size; sensitivity {_shown(self.sensitivity(l2_norm_clip))}"
        )


#: The modes that a string stands for.
ClippingName = Literal["flat", "per_layer", "automatic"]

_BY_NAME: dict[str, type[ClippingMode]] = {
    "flat": FlatClipping,
    "per_layer": PerLayerClipping,
    "automatic": AutomaticClipping,
}


def checked_mode(clipping: Any) -> ClippingMode:
    """The clipping mode that `clipping` names or is.

    Raises:
        ValueError: it is neither.
    """
    if isinstance(clipping, str) and clipping in _BY_NAME:
        return _BY_NAME[clipping]()
    # Not subclasses: they could bound nothing.
    if type(clipping) in _BY_NAME.values():
        return clipping
    raise ValueError(
        '`clipping` must be "flat", "per_layer", "automatic", or one of clipping.FlatClipping, '
        "clipping.PerLayerClipping(shares) and clipping.AutomaticClipping(gamma). "
        f"Received: clipping={clipping!r}"
    )


def _is_number(value: Any) -> bool:
    real = isinstance(value, numbers.Real) and not isinstance(value, bool)
    return real and math.isfinite(value)
