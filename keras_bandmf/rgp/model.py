"""enable_rgp and merge_rgp: gradient carriers on the kernels of a model; the thin layers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import keras

from keras_bandmf._checks import checked_bool, checked_float, checked_int
from keras_bandmf._keras_internals import all_layers, inner_layers, own_weights
from keras_bandmf.clipping import register_rule
from keras_bandmf.clipping.coordinates import coordinates_of, set_coordinates
from keras_bandmf.clipping.rules.base import DenseRule
from keras_bandmf.clipping.rules.conv import ConvRule
from keras_bandmf.clipping.rules.einsum import EinsumDenseRule
from keras_bandmf.clipping.rules.embedding import EmbeddingRule
from keras_bandmf.clipping.rules.registry import set_rule
from keras_bandmf.rgp.arguments import named_layers, within
from keras_bandmf.rgp.carrier import Carrier
from keras_bandmf.rgp.head import head_layers, scale_head
from keras_bandmf.rgp.layouts import CarriedKernel, carried_kernel
from keras_bandmf.rgp.rules import CarrierRule, type_rule


def enable_rgp(
    model: keras.Model,
    rank: int,
    layers: Sequence[str | keras.layers.Layer] | None = None,
    exclude: Sequence[str | keras.layers.Layer] | None = None,
    refresh_every: int = 1,
    power_iterations: int = 1,
    warmup_steps: int = 0,
    head_scale: float = 1.0,
    restart: bool = False,
) -> keras.Model:
    """Makes the private training of a model release low-rank coordinates of its gradients.

    In place, before `compile`: the kernels of Dense, EinsumDense, Embedding and Conv2D layers get
    carriers L (m, r) and R (r, n) (Yu et al., arXiv 2106.09352). Per-example gradients are clipped
    and noised in their r (m + n) coordinates, and the inner optimizer gets the gradient of the
    whole kernel rebuilt from them. Outputs, saved files and exports are those of the plain model;
    a loaded or cloned model has no carriers.

    Formal guarantees:
        What is released in a step is a clipped sum plus noise in coordinates that were fixed before
        the batch was drawn, of a norm at most the clip norm for each example: the plan's guarantee
        holds as without carriers.

    Args:
        model: built, and not compiled.
        rank: r. Without `layers`, a kernel with a side below r is left as it is.
        layers: names, paths or layers that get carriers. By default all that are trained, except
            the head (the layers that make the outputs) and kernels of axis 1.
        exclude: names, paths or layers left as they are.
        refresh_every: steps between two refreshes of the carriers. Noise may be correlated within
            such a block only: the plan's strategy must be a `BlockDiagonalStrategy` of this block,
            or have one band.
        power_iterations: of each refresh; the paper's code takes 1.
        warmup_steps: steps in which the carriers follow the weights W_t themselves, from W_0 on;
            after that the historical update W_t - W_0. For a pre-trained model take all steps, as
            the paper's code does: what it has learnt says more than the first noisy updates.
        head_scale: factor of the head's per-example gradients before clipping, not undone after;
            the paper's code takes 0.1 for language and 0.01 for images.
        restart: whether a refresh begins at new random carriers, as the paper's algorithm 2, or at
            those before it. Weights of a pre-trained model hardly move, so carriers that go on from
            each other settle in the same few directions, and no others are ever trained: restart
            them where they follow weights. Updates are followed best from where they were.

    Returns:
        The same model.

    Raises:
        TypeError: if `model` is not a Keras model, or `rank` is not an integer.
        ValueError: if the model is not built or is compiled, has carriers already, or an argument
            or a layer does not fit.
    """
    numbers = {
        "rank": rank,
        "refresh_every": refresh_every,
        "power_iterations": power_iterations,
        "warmup_steps": warmup_steps,
    }
    numbers = {
        name: checked_int(name, value, 0 if name == "warmup_steps" else 1)
        for name, value in numbers.items()
    }
    head_scale = checked_float("head_scale", head_scale, above=0.0)
    restart = checked_bool("restart", restart)
    if not isinstance(model, keras.Model):
        raise TypeError(
            "Argument `model` must be a keras.Model of Keras 3. "
            f"Received: model of type {type(model).__name__}"
        )
    if not model.built:
        raise ValueError(
            "Carriers need kernels: call the model once on data, or start it with `keras.Input`. "
            f"Received: model '{model.name}' that is not built"
        )
    if model.compiled:
        raise ValueError(
            "`enable_rgp` must be called before `compile`: optimizer and noise are made for the "
            f"coordinates. Received: model '{model.name}', which is compiled."
        )
    candidates = _candidates(model, layers, exclude, rank)
    if not candidates:
        raise ValueError(
            "No kernel is left that could have carriers: they are excluded, frozen, part of the "
            f"head, or have a side below the rank. Received: rank={rank}, layers={layers!r}, "
            f"exclude={exclude!r}. Name the layers, or choose a smaller rank."
        )
    if head_scale != 1:
        scale_head(head_layers(model), candidates, head_scale)
    for layer in candidates:
        _carry(layer, **numbers, restart=restart)
    return model


def merge_rgp(model: keras.Model) -> keras.Model:
    """Takes the carriers off a model: plain layers with the weights trained so far.

    Args:
        model: with carriers.

    Returns:
        The same model.

    Raises:
        ValueError: if it has none.
    """
    merged = False
    for layer in all_layers(model):
        own = own_weights(layer)
        if all(coordinates_of(variable) is None for variable in own):
            continue
        for variable in own:
            set_coordinates(variable, None)
        set_rule(layer, None)
        if isinstance(layer, _Thin):
            layer.rgp = None
        merged = True
    if not merged:
        raise ValueError(
            f"The model has no gradient carriers. Received: model '{model.name}'. Only models of "
            "`enable_rgp` or of RGP layers have."
        )
    # A step traced with the carriers would go on using them.
    model.train_function = None
    return model


def _candidates(
    model: keras.Model, layers: Any, exclude: Any, rank: int
) -> list[keras.layers.Layer]:
    """The layers that get carriers, in the model's order."""
    every = all_layers(model, include_self=False)
    excluded = {id(layer) for layer in within(named_layers("exclude", exclude, every))}
    named = named_layers("layers", layers, every)
    asked = {id(layer) for layer in (every if layers is None else within(named))} - excluded
    head = {id(layer) for layer in head_layers(model)}
    chosen, kernels = [], set()
    for layer in every:
        found = carried_kernel(layer)
        carried = not isinstance(found, str) and coordinates_of(found.variable) is not None
        if carried and getattr(layer, "rgp", None) is None:
            raise ValueError(
                "`enable_rgp` may be called once. Received: a model whose layer "
                f"'{layer.path}' has carriers. Call `merge_rgp(model)` first."
            )
        if carried or id(layer) not in asked:  # an RGP layer has its own
            continue
        by_name = any(layer is other for other in named)
        if isinstance(found, str):
            reason = None if inner_layers(layer) else found
        else:
            reason = _left_out(layer, found, rank, set() if by_name else head)
        if reason is not None and by_name:
            raise ValueError(
                f"`layers` must name layers that can have carriers. Received: '{layer.path}': "
                f"{reason}."
            )
        if isinstance(found, str) or reason is not None:
            continue
        if id(found.variable) not in kernels:
            _check_kernel(layer, found, rank)
            kernels.add(id(found.variable))
            chosen.append(layer)
    return chosen


def _left_out(
    layer: keras.layers.Layer, kernel: CarriedKernel, rank: int, head: set[int]
) -> str | None:
    """Returns why a layer is to get no carriers, or None."""
    if not kernel.variable.trainable:
        return "it is not trained"
    m, n = kernel.layout.sides
    if min(m, n) < max(rank, 2):
        return f"its kernel is a matrix of {m} x {n}, rank={rank} is above the shorter side"
    return "it is part of the head" if id(layer) in head else None


def _check_kernel(layer: keras.layers.Layer, kernel: CarriedKernel, rank: int) -> None:
    m, n = kernel.layout.sides
    if rank > min(m, n):
        raise ValueError(
            f"`rank` must be at most the shorter side of a kernel. Received: rank={rank} for "
            f"'{layer.path}', a matrix of {m} x {n}. Choose a smaller rank or leave the layer out."
        )
    constraint = kernel.variable.constraint
    if constraint is not None:
        raise ValueError(
            "A kernel with a constraint cannot have carriers: what the constraint does to the "
            f"weights is no gradient the carriers could follow. Received: '{layer.path}' with "
            f"{type(constraint).__name__}. Remove it, or name the layer in `exclude`."
        )


def _carry(layer: keras.layers.Layer, **options: Any) -> None:
    """Puts carriers on a layer's kernel; `options` are those of `Carrier`."""
    kernel = _kernel_to_carry(layer)
    double = keras.backend.standardize_dtype(kernel.variable.dtype) == "float64"
    dtype = "float64" if double else "float32"
    carrier = Carrier(kernel.layout, kernel.variable.path, dtype, **options)
    set_rule(layer, CarrierRule(type_rule(layer), carrier))
    set_coordinates(kernel.variable, carrier)


def _kernel_to_carry(layer: keras.layers.Layer) -> CarriedKernel:
    found = carried_kernel(layer)
    if isinstance(found, str):
        raise ValueError(f"The layer cannot have carriers: {found}. Received: '{layer.path}'.")
    return found


class _Thin(keras.layers.Layer):
    """What the RGP layers have in common: carriers from `build` on, and a config that says so."""

    carries_gradients = True

    def _init_rgp(self, rank: int | None, refresh_every: int, power_iterations: int) -> None:
        self.rgp: dict[str, int] | None = None
        if rank is None:  # of a layer whose carriers were merged
            return
        numbers = {
            "rank": rank,
            "refresh_every": refresh_every,
            "power_iterations": power_iterations,
        }
        self.rgp = {name: checked_int(name, value) for name, value in numbers.items()}

    def build(self, input_shape: Any = None) -> None:
        """Builds the layer and puts carriers on its kernel.

        Raises:
            ValueError: if the rank exceeds a side of the kernel, or the kernel cannot have any.
        """
        super().build(input_shape)
        if self.rgp is None:
            return
        # Keras marks a layer built after `build`; `carried_kernel` asks for it.
        self.built = True
        _check_kernel(self, _kernel_to_carry(self), self.rgp["rank"])
        _carry(self, **self.rgp)

    def get_config(self) -> dict[str, Any]:
        """The config of the Keras layer, and rank and refreshes."""
        merged = {"rank": None, "refresh_every": 1, "power_iterations": 1}
        return {**super().get_config(), **(self.rgp or merged)}


@keras.saving.register_keras_serializable(package="keras_bandmf")
class RGPDense(_Thin, keras.layers.Dense):
    """`keras.layers.Dense` whose kernel has gradient carriers of `rank`; see `enable_rgp`."""

    def __init__(
        self,
        units: int,
        rank: int | None,
        refresh_every: int = 1,
        power_iterations: int = 1,
        **kwargs: Any,
    ):
        super().__init__(units, **kwargs)
        self._init_rgp(rank, refresh_every, power_iterations)


@keras.saving.register_keras_serializable(package="keras_bandmf")
class RGPEinsumDense(_Thin, keras.layers.EinsumDense):
    """`keras.layers.EinsumDense` with gradient carriers of `rank`; see `enable_rgp`."""

    def __init__(
        self,
        equation: str,
        output_shape: Any,
        rank: int | None,
        refresh_every: int = 1,
        power_iterations: int = 1,
        **kwargs: Any,
    ):
        super().__init__(equation, output_shape, **kwargs)
        self._init_rgp(rank, refresh_every, power_iterations)


@keras.saving.register_keras_serializable(package="keras_bandmf")
class RGPConv2D(_Thin, keras.layers.Conv2D):
    """`keras.layers.Conv2D` with gradient carriers of `rank`; see `enable_rgp`."""

    def __init__(
        self,
        filters: int,
        kernel_size: Any,
        rank: int | None,
        refresh_every: int = 1,
        power_iterations: int = 1,
        **kwargs: Any,
    ):
        super().__init__(filters, kernel_size, **kwargs)
        self._init_rgp(rank, refresh_every, power_iterations)


@keras.saving.register_keras_serializable(package="keras_bandmf")
class RGPEmbedding(_Thin, keras.layers.Embedding):
    """`keras.layers.Embedding` with gradient carriers of `rank`; see `enable_rgp`."""

    def __init__(
        self,
        input_dim: int,
        output_dim: int,
        rank: int | None,
        refresh_every: int = 1,
        power_iterations: int = 1,
        **kwargs: Any,
    ):
        super().__init__(input_dim, output_dim, **kwargs)
        self._init_rgp(rank, refresh_every, power_iterations)


register_rule(RGPDense, DenseRule())
register_rule(RGPEinsumDense, EinsumDenseRule())
register_rule(RGPConv2D, ConvRule())
register_rule(RGPEmbedding, EmbeddingRule())
