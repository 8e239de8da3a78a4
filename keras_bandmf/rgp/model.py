"""`enable_rgp`, `merge_rgp` and the RGP layers: gradient carriers on the kernels of a model."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
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
from keras_bandmf.rgp.public import Pair, checked_carriers, main_directions
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
    carriers: Sequence[Pair] | None = None,
) -> keras.Model:
    """Enables RGP: private training of `model` releases low-rank projections of its gradients.

    Call it before `compile`. It changes the model in place: the kernels of Dense, EinsumDense,
    Embedding and Conv2D layers get carriers L (m, r) and R (r, n) (Yu et al., "Large Scale Private
    Learning via Low-rank Reparametrization", arXiv 2106.09352). Per-example gradients are clipped
    and noised in their r (m + n) coordinates, and the inner optimizer gets the gradient of the
    whole kernel, rebuilt from them. Outputs, saved files and exports are those of the plain model.
    A loaded or cloned model has no carriers.

    Formal guarantees:
        What is released in a step is a clipped sum plus noise in coordinates that were fixed before
        the batch was drawn, of a norm at most the clip norm for each example: the plan's guarantee
        holds as without carriers. Carriers that are given must not depend on private data, which
        nothing can check.

    Args:
        model: A model that is built and not compiled.
        rank: The rank r of the carriers. Without `layers`, a kernel with a side below r is left as
            it is.
        layers: Names, paths or layers that get carriers. By default all that are trained, except
            the head (the layers that make the outputs) and kernels with a side of length 1.
        exclude: Names, paths or layers that are left as they are.
        refresh_every: The number of steps between two refreshes of the carriers. Noise may be
            correlated only within such a block: without `carriers`, the plan's strategy must be a
            `BlockDiagonalStrategy` of this block, or have one band.
        power_iterations: The number of power iterations of each refresh. The paper's code uses 1.
        warmup_steps: The number of steps in which the carriers follow the weights W_t themselves,
            from W_0 on. After that they follow the historical update W_t - W_0. For a pre-trained
            model use all steps, as the paper's code does: what it has learned says more than the
            first noisy updates.
        head_scale: A factor for the head's per-example gradients before clipping, which is not
            undone afterwards. The paper's code uses 0.1 for language and 0.01 for images.
        restart: Whether a refresh begins at new random carriers, as algorithm 2 of the paper, or at
            the previous ones. Weights of a pre-trained model hardly move, so carriers that continue
            from each other settle in the same few directions, and no others are ever trained.
            Restart them where they follow weights. Updates are followed best without a restart.
        carriers: None, or what `public_carriers` returns, with the same `rank`, `layers` and
            `exclude`. These carriers stay in the whole run, so that noise of any plan cancels. A
            run that is continued keeps those it began with.

    Returns:
        The same model.

    Raises:
        TypeError: If `model` is not a Keras model, or an argument has the wrong type.
        ValueError: If the model is not built, is compiled or has carriers already, or if an
            argument or a layer does not fit.

    Example:
        The kernel of the first layer, a matrix of 20 x 30, is released as 4 (20 + 30) numbers.

        >>> import keras
        >>> import keras_bandmf as bandmf
        >>> layers = [keras.layers.Dense(30, name="dense"), keras.layers.Dense(2, name="head")]
        >>> model = keras.Sequential([keras.Input((20,)), *layers])
        >>> model = bandmf.enable_rgp(model, rank=4)
        >>> plan = bandmf.TrainingPlan(
        ...     num_examples=100,
        ...     batch_size=10,
        ...     num_steps=20,
        ...     num_bands=1,
        ...     noise_multiplier=1.0,
        ...     delta=1e-5,
        ... )
        >>> optimizer = bandmf.BandMFOptimizer("sgd", plan, l2_norm_clip=1.0)
        >>> optimizer.build(model.trainable_variables)
        >>> x, y = keras.ops.ones((3, 20)), keras.ops.ones((3, 2))
        >>> clipped = bandmf.clipped_gradients(model, x, y, loss="mse")
        >>> [tuple(total.shape) for total in clipped.sums]
        [(200,), (30,), (30, 2), (2,)]
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
    candidates = _checked_candidates(model, layers, exclude, numbers["rank"])
    if model.compiled:
        raise ValueError(
            "Expected `enable_rgp` to be called before `compile`, because optimizer and noise are "
            f"made for the coordinates. Received: model '{model.name}', which is compiled."
        )
    fixed: list[Pair | None] = [None] * len(candidates)
    if carriers is not None:
        _check_defaults(**numbers, restart=restart)
        kernels = [_kernel_to_carry(each) for each in candidates]
        fixed = [*checked_carriers(carriers, kernels, rank)]
    if head_scale != 1:
        scale_head(head_layers(model), candidates, head_scale)
    for layer, pair in zip(candidates, fixed, strict=True):
        _carry(layer, **numbers, restart=restart, fixed=pair)
    return model


def public_carriers(
    model: keras.Model,
    batches: Iterable[Any],
    rank: int,
    loss: Any = None,
    l2_norm_clip: float = 1.0,
    layers: Sequence[str | keras.layers.Layer] | None = None,
    exclude: Sequence[str | keras.layers.Layer] | None = None,
    iterations: int = 4,
) -> list[Pair]:
    """Finds carriers for `enable_rgp(carriers=...)` in the gradients of public data.

    Gradients of one task point in few directions, and those of another task that is like it share
    them. Noise in only these directions is much smaller than noise in all. As the carriers stay
    in the whole run, noise may be correlated over all steps, and its state is small. The idea of a
    subspace from public gradients is that of Zhou, Wu and Banerjee, "Bypassing the Ambient
    Dimension: Private SGD with Gradient Subspace Identification" (arXiv 2007.03813), and of Yu et
    al., "Do Not Let Privacy Overbill Utility" (arXiv 2102.12677).

    For each kernel, with G the sum of the clipped gradients of one batch as a matrix, L has the
    first `rank` eigenvectors of the sum over batches of G G', and R those of G' G, to the accuracy
    of a few passes of subspace iteration. So a table of many rows costs no more memory than its
    gradient.

    Formal guarantees:
        None: `batches` are read without privacy, and the carriers tell about them. Epsilon does
        not cover these data. They must be public.

    Args:
        model: The model as it is before private training, built and without carriers. It should
            know the public data: the directions of a head that knows nothing are other ones.
            Train a model on them, and give its weights to a fresh one with `set_weights`, since
            `enable_rgp` takes none that is compiled.
        batches: A `tf.data.Dataset` or a list of pairs (x, y): public examples, a few hundred or
            more, in batches of about 16. They are gone through `iterations` times.
        rank: As in `enable_rgp`.
        loss: As in `clipped_gradients`: needed where the model is not compiled.
        l2_norm_clip: The norm to which gradients are clipped, so that long ones do not rule. The
            clip norm of the private run is a good choice.
        layers: As in `enable_rgp`.
        exclude: As in `enable_rgp`.
        iterations: The number of passes. More of them help where the directions after the first
            `rank` are nearly as large.

    Returns:
        L (m, r) and R (r, n), float32, for each kernel, in the order of the layers. A checkpoint
        of the private run has them, too.

    Raises:
        TypeError: If `model` is not a Keras model, or an argument has the wrong type.
        ValueError: If the model is not built, has carriers or is distributed, or an argument, a
            batch or a layer does not fit, or no gradient reaches a kernel. An example whose
            gradient is not finite counts as zero.

    Example:
        >>> import keras
        >>> import numpy as np
        >>> import keras_bandmf as bandmf
        >>> layers = [keras.layers.Dense(30, name="dense"), keras.layers.Dense(2, name="head")]
        >>> model = keras.Sequential([keras.Input((20,)), *layers])
        >>> rng = np.random.default_rng(0)
        >>> public = [(rng.normal(size=(16, 20)), rng.normal(size=(16, 2))) for _ in range(4)]
        >>> carriers = bandmf.public_carriers(model, public, rank=4, loss="mse")
        >>> [left.shape + right.shape for left, right in carriers]
        [(20, 4, 4, 30)]
        >>> model = bandmf.enable_rgp(model, rank=4, carriers=carriers)
    """
    rank = checked_int("rank", rank)
    candidates = _checked_candidates(model, layers, exclude, rank)
    kernels = [_kernel_to_carry(layer) for layer in candidates]
    return main_directions(model, batches, kernels, rank, loss, l2_norm_clip, iterations)


def merge_rgp(model: keras.Model) -> keras.Model:
    """Takes the carriers off a model and leaves plain layers with the weights trained so far.

    Args:
        model: A model with carriers.

    Returns:
        The same model.

    Raises:
        ValueError: If it has no carriers.

    Example:
        >>> import keras
        >>> import keras_bandmf as bandmf
        >>> model = keras.Sequential([keras.Input((20,)), bandmf.layers.RGPDense(30, rank=4)])
        >>> model = bandmf.merge_rgp(model)
        >>> model.layers[0].get_config()["rank"] is None
        True
    """
    _check_model(model)
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
            "Expected a model with gradient carriers: one of `enable_rgp` or with RGP layers. "
            f"Received: model '{model.name}'"
        )
    # A step that was traced with the carriers would continue to use them.
    model.train_function = None
    return model


def _check_model(model: Any) -> None:
    if not isinstance(model, keras.Model):
        raise TypeError(
            "Expected `model` to be a keras.Model of Keras 3. "
            f"Received: model of type {type(model).__name__}"
        )


def _check_defaults(**schedule: int | bool) -> None:
    """Refuses arguments about refreshes where there are none."""
    defaults = {"refresh_every": 1, "power_iterations": 1, "warmup_steps": 0, "restart": False}
    given = [name for name, default in defaults.items() if schedule[name] != default]
    if given:
        raise ValueError(
            f"Expected no `{given[0]}` together with `carriers`, which are never refreshed. Leave "
            f"it out. Received: {given[0]}={schedule[given[0]]}"
        )


def _checked_candidates(
    model: keras.Model, layers: Any, exclude: Any, rank: int
) -> list[keras.layers.Layer]:
    """Returns the layers of a built model that get carriers, at least one."""
    _check_model(model)
    if not model.built:
        raise ValueError(
            "Expected `model` to be built, because carriers need kernels. Call it once on data, or "
            f"start it with `keras.Input`. Received: model '{model.name}', which is not built"
        )
    candidates = _candidates(model, layers, exclude, rank)
    if not candidates:
        raise ValueError(
            "Expected at least one kernel that can have carriers. All are excluded, frozen, part "
            "of the head, or have a side below the rank. Name the layers, or choose a smaller "
            f"rank. Received: rank={rank}, layers={layers!r}, exclude={exclude!r}"
        )
    return candidates


def _candidates(
    model: keras.Model, layers: Any, exclude: Any, rank: int
) -> list[keras.layers.Layer]:
    """Returns the layers that get carriers, in the model's order."""
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
                "Expected a model without carriers. Call `merge_rgp(model)` first. "
                f"Received: a model whose layer '{layer.path}' has carriers"
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
                "Expected `layers` to name layers that can have carriers. "
                f"Received: '{layer.path}': {reason}"
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
            "Expected `rank` to be at most the shorter side of a kernel. Choose a smaller rank or "
            f"leave the layer out. Received: rank={rank} for '{layer.path}', a matrix of {m} x {n}"
        )
    constraint = kernel.variable.constraint
    if constraint is not None:
        raise ValueError(
            "Expected a kernel without a constraint: carriers cannot follow what a constraint does "
            "to the weights. Remove it, or name the layer in `exclude`. "
            f"Received: '{layer.path}' with {type(constraint).__name__}"
        )


def _carry(layer: keras.layers.Layer, **options: Any) -> None:
    """Puts carriers on a layer's kernel. The options are those of `Carrier`."""
    kernel = _kernel_to_carry(layer)
    double = keras.backend.standardize_dtype(kernel.variable.dtype) == "float64"
    carrier = Carrier(
        kernel.layout, kernel.variable.path, "float64" if double else "float32", **options
    )
    set_rule(layer, CarrierRule(type_rule(layer), carrier))
    set_coordinates(kernel.variable, carrier)


def _kernel_to_carry(layer: keras.layers.Layer) -> CarriedKernel:
    found = carried_kernel(layer)
    if isinstance(found, str):
        raise ValueError(
            "Expected a layer that can have carriers. "
            f"Received: '{layer.path}' of type {type(layer).__name__}: {found}"
        )
    return found


class _Thin(keras.layers.Layer):
    """What the RGP layers have in common: carriers from `build` on, and their settings."""

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
            ValueError: If the rank exceeds a side of the kernel, or the kernel cannot have any.
        """
        super().build(input_shape)
        if self.rgp is None:
            return
        # Keras marks a layer as built only after `build`, and `carried_kernel` asks for it.
        self.built = True
        _check_kernel(self, _kernel_to_carry(self), self.rgp["rank"])
        _carry(self, **self.rgp)

    def get_config(self) -> dict[str, Any]:
        """Returns the config of the Keras layer, with rank and refreshes."""
        merged = {"rank": None, "refresh_every": 1, "power_iterations": 1}
        return {**super().get_config(), **(self.rgp or merged)}


@keras.saving.register_keras_serializable(package="keras_bandmf")
class RGPDense(_Thin, keras.layers.Dense):
    """A `keras.layers.Dense` whose kernel has gradient carriers; see `enable_rgp`.

    Args:
        units: See `keras.layers.Dense`.
        rank: The rank of the carriers, at most the shorter side of the kernel as a matrix. None for
            a layer whose carriers were merged.
        refresh_every: The number of steps between two refreshes of the carriers.
        power_iterations: The number of power iterations of each refresh.
        **kwargs: The other arguments of `keras.layers.Dense`.

    Raises:
        TypeError: If an argument of the carriers is not an integer.
        ValueError: If it is below 1; in `build`, if the rank exceeds a side of the kernel.

    Example:
        >>> from keras_bandmf import layers
        >>> layer = layers.RGPDense(30, rank=4)
        >>> layer.build((None, 20))
        >>> tuple(layer.kernel.shape)
        (20, 30)
    """

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
    """A `keras.layers.EinsumDense` whose kernel has gradient carriers; see `enable_rgp`.

    Args:
        equation: See `keras.layers.EinsumDense`. The kernel must be one matrix for all positions.
        output_shape: See `keras.layers.EinsumDense`.
        rank: The rank of the carriers, at most the shorter side of the kernel as a matrix. None for
            a layer whose carriers were merged.
        refresh_every: The number of steps between two refreshes of the carriers.
        power_iterations: The number of power iterations of each refresh.
        **kwargs: The other arguments of `keras.layers.EinsumDense`.

    Raises:
        TypeError: If an argument of the carriers is not an integer.
        ValueError: If it is below 1; in `build`, if the rank exceeds a side of the kernel.

    Example:
        >>> from keras_bandmf import layers
        >>> layer = layers.RGPEinsumDense("abc,cde->abde", (None, 2, 8), rank=4)
        >>> layer.build((None, 10, 20))
        >>> tuple(layer.kernel.shape)
        (20, 2, 8)
    """

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
    """A `keras.layers.Conv2D` whose kernel has gradient carriers; see `enable_rgp`.

    Args:
        filters: See `keras.layers.Conv2D`.
        kernel_size: See `keras.layers.Conv2D`.
        rank: The rank of the carriers, at most the shorter side of the kernel as a matrix. None for
            a layer whose carriers were merged.
        refresh_every: The number of steps between two refreshes of the carriers.
        power_iterations: The number of power iterations of each refresh.
        **kwargs: The other arguments of `keras.layers.Conv2D`.

    Raises:
        TypeError: If an argument of the carriers is not an integer.
        ValueError: If it is below 1; in `build`, if the rank exceeds a side of the kernel.

    Example:
        >>> from keras_bandmf import layers
        >>> layer = layers.RGPConv2D(16, 3, rank=4)
        >>> layer.build((None, 28, 28, 8))
        >>> tuple(layer.kernel.shape)
        (3, 3, 8, 16)
    """

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
    """A `keras.layers.Embedding` whose table has gradient carriers; see `enable_rgp`.

    Args:
        input_dim: See `keras.layers.Embedding`.
        output_dim: See `keras.layers.Embedding`.
        rank: The rank of the carriers, at most the shorter side of the kernel as a matrix. None for
            a layer whose carriers were merged.
        refresh_every: The number of steps between two refreshes of the carriers.
        power_iterations: The number of power iterations of each refresh.
        **kwargs: The other arguments of `keras.layers.Embedding`.

    Raises:
        TypeError: If an argument of the carriers is not an integer.
        ValueError: If it is below 1; in `build`, if the rank exceeds a side of the kernel.

    Example:
        >>> from keras_bandmf import layers
        >>> layer = layers.RGPEmbedding(1000, 32, rank=4)
        >>> layer.build()
        >>> tuple(layer.embeddings.shape)
        (1000, 32)
    """

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
