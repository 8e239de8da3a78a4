"""Per-example gradients, clipped and summed: the start of a private training step."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, Literal

import keras
import numpy as np
import tensorflow as tf

from keras_bandmf._checks import checked_bool, checked_int
from keras_bandmf.clipping.attached import all_with_attached
from keras_bandmf.clipping.checks.refusals import (
    checked_microbatch_size,
    refuse_model,
    refuse_no_rows,
    refuse_short_products,
    refuse_sparse_data,
)
from keras_bandmf.clipping.clipper import Clipper, accumulation_dtype
from keras_bandmf.clipping.factors import Unsupported
from keras_bandmf.clipping.losses import batch_loss, build_loss
from keras_bandmf.clipping.modes import (
    AdaptiveClipping,
    ClippingMode,
    ClippingName,
    checked_mode,
)
from keras_bandmf.clipping.norms import checked_clip_norm
from keras_bandmf.clipping.passes import in_passes, with_row_numbers
from keras_bandmf.clipping.paths.book_keeping import (
    Clipped,
    clip_by_book_keeping,
    example_mask,
)
from keras_bandmf.clipping.paths.chunks import (
    ChunkFunction,
    clip_at_once,
    clip_in_chunks,
    in_rows,
    with_merged_rows,
)
from keras_bandmf.clipping.paths.microbatches import rows_at_a_time
from keras_bandmf.clipping.paths.per_example import clip_one_example
from keras_bandmf.clipping.paths.routing import give_up, route_of
from keras_bandmf.clipping.seeds import MaskSeeds
from keras_bandmf.clipping.shapes import by_example, on_tensors


class Origin:
    """The model whose gradients were taken, and its variables; compared by identity."""

    def __init__(self, model: Any):
        self.model = model
        self.variables = tuple(model.trainable_variables)

    def belongs_to(self, variables: Any) -> bool:
        """Returns whether these are the very same variables in the same order."""
        return [id(v) for v in self.variables] == [id(v) for v in variables]

    def __eq__(self, other: Any) -> bool:
        same = isinstance(other, Origin) and self.model is other.model
        return same and self.belongs_to(other.variables)

    def __hash__(self) -> int:
        return hash((id(self.model), *(id(v) for v in self.variables)))


@dataclasses.dataclass(frozen=True, kw_only=True)
class ClippedGradients:
    """Clipped gradients of one batch, summed over its examples.

    Only `clipped_gradients` makes them. An optimizer that takes nothing else therefore knows that
    every example was clipped. They can be passed to and returned from a `tf.function`.

    Attributes:
        sums: One tensor for each entry of `model.trainable_variables`, in its shape (a vector of
            coordinates for a kernel with low-rank carriers). It is the sum over the examples, never
            a mean: float32, or float64 with `float64_sums=True` or if the model has float64
            variables.
        norms: Shape (examples,). The gradient norms before clipping. Not private: for tests and
            diagnosis.
        losses: Shape (rows,). The loss of each row, masked rows included. Not private.
        was_clipped: Shape (examples,), bool. Whether clipping made the gradient smaller or dropped
            it; False for padding. Not private. Adaptive clipping multiplies all gradients; there it
            says whose factor is less than that of a short one.
        outputs: What the model returned in the training forward pass. Not private.
        attached: For each tensor of `outputs`, what Keras's losses and metrics read besides it: its
            `"mask"` and its `"logits"`, where there are any. Functions return tensors without them;
            `all_with_attached` puts them back. Not private.
        mask: Shape (rows,), bool. False marks padding, which contributes zero.
        rows_mixed: Scalar bool. True if the loss of one row was seen to depend on another row, so
            that clipping bounds nothing and `sums` must not be used. `apply_clipped` then makes the
            update NaN.
        rows_per_example: The number of consecutive rows that are one example; mostly 1.
        l2_norm_clip: The largest norm of one example's contribution.
        clipping: The clipping mode.
        origin: The model, and the variables whose gradients these are.
        adaptation: For `AdaptiveClipping`, the clip norm of this step and the count of small
            gradients, which is one more coordinate of the clipped sum; else None.

    Example:
        >>> import keras
        >>> import numpy as np
        >>> import keras_bandmf as bandmf
        >>> dense = keras.layers.Dense(1, use_bias=False, kernel_initializer="zeros")
        >>> model = keras.Sequential([keras.Input((1,)), dense])
        >>> x, y = np.array([[1.0], [1.0]]), np.array([[3.0], [0.1]])
        >>> clipped = bandmf.clipped_gradients(model, x, y, loss="mse", l2_norm_clip=1.0)
        >>> print(clipped.norms.numpy().round(2), clipped.was_clipped.numpy())
        [6.  0.2] [ True False]
    """

    sums: list[tf.Tensor]
    norms: tf.Tensor
    losses: tf.Tensor
    was_clipped: tf.Tensor
    outputs: Any
    attached: list[dict[str, tf.Tensor]]
    mask: tf.Tensor
    rows_mixed: tf.Tensor
    rows_per_example: int
    l2_norm_clip: float
    clipping: ClippingMode
    origin: Origin
    adaptation: tuple[tf.Tensor, tf.Tensor] | None = None

    @property
    def example_mask(self) -> tf.Tensor:
        """Which examples have a row that is not padding: shape (examples,), bool."""
        return example_mask(self.mask, self.rows_per_example)

    def __tf_flatten__(self) -> tuple:
        """Returns (constants, tensors), as TensorFlow's protocol for structures asks."""
        constants = (self.rows_per_example, self.l2_norm_clip, self.clipping, self.origin)
        rows = (self.norms, self.losses, self.was_clipped, self.outputs, self.attached, self.mask)
        return constants, (list(self.sums), *rows, self.rows_mixed, list(self.adaptation or ()))

    @classmethod
    def __tf_unflatten__(cls, constants: tuple, tensors: tuple) -> ClippedGradients:
        """Returns what `__tf_flatten__` took apart."""
        sums, norms, losses, was_clipped, outputs, attached, mask, rows_mixed, adapted = tensors
        return cls(
            sums=list(sums),
            norms=norms,
            losses=losses,
            was_clipped=was_clipped,
            outputs=outputs,
            attached=attached,
            mask=mask,
            rows_mixed=rows_mixed,
            rows_per_example=constants[0],
            l2_norm_clip=constants[1],
            clipping=constants[2],
            origin=constants[3],
            adaptation=tuple(adapted) or None,
        )


@tf.autograph.experimental.do_not_convert
def clipped_gradients(
    model: keras.Model,
    x: Any,
    y: Any = None,
    sample_weight: Any = None,
    *,
    l2_norm_clip: float = 1.0,
    clipping: ClippingName | ClippingMode = "flat",
    mask: Any = None,
    microbatch_size: int | Literal["auto"] | None = None,
    loss: Any = None,
    mask_seeds: MaskSeeds | None = None,
    float64_sums: bool = False,
    rows_per_example: int = 1,
    current_norm: tf.Tensor | None = None,
) -> ClippedGradients:
    """Clips the gradient of every example to norm `l2_norm_clip` and returns their sum.

    The gradient of example i is that of the loss Keras would compute on a batch that holds example
    i alone. Sample weights, temporal weights, Keras masks, several outputs and loss weights are
    included. Weight regularizers, which do not depend on data, and the factor 1 / replicas of a
    distribution strategy are left out. By default the norm is taken over all trainable variables
    jointly, and the gradient is multiplied by min(1, l2_norm_clip / norm) (Abadi et al., 2016,
    algorithm 1). `clipping` chooses other factors.

    A model whose layers all have a clipping rule takes the book-keeping path: one forward and one
    backward pass for the whole batch (Bu et al., 2023). Any other model is run one example at a
    time. `clipping.explain(model)` tells which path is taken, and why. The function works in eager
    mode, in a `tf.function`, under XLA and in a replica context. In eager mode the Python code of
    model and loss sees the rows themselves, and what it keeps of them has no noise: call this
    function inside a `tf.function` that gets the rows as arguments.

    Args:
        model: A built Keras model. It must be compiled unless `loss` is given.
        x: The inputs: an array, a tensor, or a structure of them. Axis 0 is the example.
        y: The targets in the same form, or None.
        sample_weight: None, weights of shape (batch,) or (batch, time), or a structure with an
            entry for each output.
        l2_norm_clip: The largest norm of one example's contribution, a constant of the run.
        clipping: "flat", "per_layer" (equal shares), "automatic" (normalized gradients), "adaptive"
            (a clip norm that follows the gradients), or a mode with settings:
            `clipping.PerLayerClipping`, `clipping.AutomaticClipping`, `clipping.AdaptiveClipping`.
            The bound is `l2_norm_clip` in each of them.
        mask: Shape (batch,), bool. False marks padding. None if every row is an example.
        microbatch_size: The largest number of examples to work on at a time. None means all of
            them, and "auto" as many as fit in 1 GiB. It changes memory use, never the result
            (dropout masks excepted), and need not divide the batch.
        loss: None for the compiled loss. Otherwise, for a model with one output, a name, a
            `keras.losses.Loss`, or a function (y_true, y_pred).
        mask_seeds: Where dropout masks and other random numbers of the forward pass come from: a
            secret key and the step, which the private `fit` passes. With None, Keras's own seed
            generators are used. That is enough where each row has a fixed place and neighboring
            data sets differ by the mask of one row (`sampling="fixed_order"`, the only sampling for
            which a custom training loop is accepted): masks belong to places, and no place changes.
            It is not enough where the rows of a batch are sampled, because one more row gives all
            others new masks.
        float64_sums: Whether to compute norms and sums in float64, from the activations and
            gradients of the pass. `noise="exact"` asks for it. Products of matrices then take about
            five times as long on a CPU, and twice the memory.
        rows_per_example: The number of consecutive rows that are one example: rows 0 to K - 1 are
            the first, and so on. They may be augmented views of one picture, or several rows of
            one person. The gradient of the example is the mean over those of its rows that `mask`
            does not leave out, and is clipped once. `mask` and everything else still has an entry
            for each row; `microbatch_size` counts examples.
        current_norm: With adaptive clipping, the clip norm of this step: what
            `optimizer.current_norm()` returns. By default gradients are clipped at `l2_norm_clip`,
            and `apply_clipped` refuses them.

    Returns:
        `ClippedGradients`.

    Raises:
        TypeError: If an argument has the wrong type.
        ValueError: If there is no loss; if the clip norm, the mode, the microbatch size or the mask
            is not allowed; if data are ragged or sparse; if a layer is known to mix examples; for
            float16; for a loss with `mean_with_sample_weight` and weights; on a GPU that may round
            float32 products to TensorFloat-32; or, in a graph, if the pass writes a variable or
            draws random numbers in another way than described above (`captures.Watch`).

    Formal guarantees: adding or removing one row, or setting its mask, changes `sums` by a vector
    of joint norm at most `l2_norm_clip`, up to rounding (`noise.lattice.charged_norm` says how
    large that is, and what is proved about it). This holds by construction: a model of layers and
    operations that are known to treat rows independently (`rowwise`), whose tensors have the
    declared shapes in the very trace that runs, takes the book-keeping path, and any other goes one
    row at a time. It rests on a promise only where a layer was declared row-wise. Rows that are
    masked out, or whose gradient is not finite, contribute exactly zero and leave the others as
    they were. On the book-keeping path masked rows also serve as sentinels: a gradient at one of
    their activations sets `rows_mixed` (`clip_by_book_keeping` says what this cannot see). Without
    masked rows, as in a direct call without `mask`, there is no sentinel. With random layers this
    holds for each value of the masks: with `mask_seeds` whatever places the rows stand at
    (`MaskSeeds` has the proof), without them for setting the mask of a row only. `norms`, `losses`,
    `was_clipped` and `outputs` carry no guarantee.

    Example:
        Two examples have gradients of norm 6 and 0.2. The first is clipped to norm 1.

        >>> import keras
        >>> import numpy as np
        >>> import keras_bandmf as bandmf
        >>> dense = keras.layers.Dense(1, use_bias=False, kernel_initializer="zeros")
        >>> model = keras.Sequential([keras.Input((1,)), dense])
        >>> x, y = np.array([[1.0], [1.0]]), np.array([[3.0], [0.1]])
        >>> clipped = bandmf.clipped_gradients(model, x, y, loss="mse", l2_norm_clip=1.0)
        >>> print(clipped.sums[0].numpy().round(4))
        [[-1.2]]
    """
    checked_bool("float64_sums", float64_sums)
    clipped = clipped_for_noise(
        model,
        x,
        y,
        sample_weight,
        l2_norm_clip=l2_norm_clip,
        clipping=clipping,
        mask=mask,
        microbatch_size=microbatch_size,
        loss=loss,
        mask_seeds=mask_seeds,
        float64_sums=float64_sums,
        rows_per_example=rows_per_example,
        current_norm=current_norm,
    )
    dtype = accumulation_dtype(model.trainable_variables, float64_sums)
    return dataclasses.replace(clipped, sums=[tf.cast(total, dtype) for total in clipped.sums])


@tf.autograph.experimental.do_not_convert
def clipped_for_noise(
    model: keras.Model,
    x: Any,
    y: Any,
    sample_weight: Any,
    *,
    l2_norm_clip: float,
    clipping: ClippingName | ClippingMode,
    mask: Any,
    microbatch_size: int | Literal["auto"] | None,
    loss: Any = None,
    mask_seeds: MaskSeeds | None,
    float64_sums: bool,
    rows_per_example: int = 1,
    current_norm: tf.Tensor | None = None,
) -> ClippedGradients:
    """Returns `clipped_gradients` with `sums` in the dtype in which they were added up.

    That is float64 where it was used, else float32. The noise is added in float64 anyway, and to
    round before that would cost two passes over a large table.
    """
    clip = checked_clip_norm(l2_norm_clip)
    size = checked_microbatch_size(microbatch_size)
    refuse_sparse_data(x, y, sample_weight)
    refuse_short_products()
    mode = checked_mode(clipping)
    current_norm = _checked_current_norm(current_norm, mode, clip)
    refuse_model(model, sample_weight, loss)
    refuse_no_rows(model, x, y, sample_weight, loss)
    if not isinstance(mask_seeds, (MaskSeeds, type(None))):
        raise TypeError(
            "Expected `mask_seeds` to be None or `clipping.MaskSeeds`. Received: "
            f"mask_seeds={mask_seeds!r}."
        )
    x, y, sample_weight = on_tensors(_tensor, (x, y, sample_weight))
    rows = next(t for t in keras.tree.flatten(x) if t is not None)
    mask = _mask(mask, rows)
    rows_per_example = _checked_rows(rows_per_example, mask)
    if not model.built:
        raise ValueError(
            "Expected `model` to be built, because its variables are needed. Call it once on data, "
            f"or start it with `keras.Input`. Received: model '{model.name}', which is not built"
        )
    build_loss(model, x, y)
    row_loss = batch_loss(model, loss)
    general = route_of(model, x, y, sample_weight, loss).general
    clipper = Clipper.of(model, clip, mode, float64_sums, current_norm)
    data = (with_row_numbers(x, mask), y, sample_weight, mask)
    if rows_per_example > 1:
        data = on_tensors(lambda t: by_example(t, rows_per_example), data)
    settings = {"clipper": clipper, "loss": row_loss, "rows_per_example": rows_per_example}

    def by_batch(way: Callable[..., Clipped]) -> ChunkFunction:
        clip = in_passes(functools.partial(way, model, **settings), model, mask_seeds)
        return clip if rows_per_example == 1 else in_rows(clip, rows_per_example)

    result = None
    if general is None:
        try:
            if size == "auto":
                most = rows_at_a_time(model, x, y, sample_weight, loss, float64_sums)
                size = max(1, most // rows_per_example)
            if size is None:
                result = clip_at_once(by_batch(clip_by_book_keeping), *data)
            else:
                result = clip_in_chunks(by_batch(clip_by_book_keeping), *data, size)
        except Unsupported as reason:
            # Something that the trial trace could not see: other shapes, or another kind of graph.
            give_up(model, str(reason))
    if result is None:
        result = clip_in_chunks(by_batch(clip_one_example), *data, 1)
    if rows_per_example > 1:
        result = with_merged_rows(result)
    result = result._replace(outputs=all_with_attached(result.outputs, result.attached))
    adaptation = None
    if isinstance(mode, AdaptiveClipping) and current_norm is not None:
        examples = example_mask(mask, rows_per_example)
        count = mode.count(result.norms, examples, clip, current_norm)
        adaptation = (current_norm, count)
    return ClippedGradients(
        **result._asdict(),
        mask=mask,
        rows_per_example=rows_per_example,
        l2_norm_clip=clip,
        clipping=mode,
        origin=Origin(model),
        adaptation=adaptation,
    )


def _checked_current_norm(current_norm: Any, mode: ClippingMode, clip: float) -> tf.Tensor | None:
    """Returns the clip norm of the step, within its bounds; None if it is not given."""
    if current_norm is None:
        return None
    if not isinstance(mode, AdaptiveClipping):
        raise ValueError(
            "Only adaptive clipping has a clip norm that changes from step to step. Received: "
            f"current_norm={current_norm!r} with clipping={mode}. Leave `current_norm` out."
        )
    try:
        current = tf.convert_to_tensor(current_norm, tf.float32)
    except (TypeError, ValueError) as error:
        raise TypeError(
            "Expected `current_norm` to be a float32 scalar, as `optimizer.current_norm()` "
            f"returns. Received: current_norm={current_norm!r}."
        ) from error
    value = tf.get_static_value(current) if current.shape.rank == 0 else None
    if isinstance(current_norm, bool) or (value is not None and not 0.0 < value < np.inf):
        raise ValueError(
            "Expected `current_norm` to be a positive number, as `optimizer.current_norm()` "
            f"returns. Received: current_norm={current_norm!r}"
        )
    if current.shape.rank != 0:
        raise ValueError(
            "Expected `current_norm` to be a scalar, as `optimizer.current_norm()` returns. "
            f"Received: a tensor of shape {tuple(current.shape)}"
        )
    return tf.clip_by_value(current, mode.least_norm(clip), mode.largest_norm(clip))


def _checked_rows(rows_per_example: Any, mask: tf.Tensor) -> int:
    hint = "It is the number of consecutive rows that are one example."
    checked = checked_int("rows_per_example", rows_per_example, hint=hint)
    rows = mask.shape[0]
    if rows is not None and rows % checked:
        raise ValueError(
            f"Expected a number of rows that is a multiple of rows_per_example={checked}. "
            f"Received: {rows} rows. Pad each example to that many rows, and mask the padding."
        )
    return checked


def _tensor(leaf: Any) -> tf.Tensor:
    # A tensor stays the same object: a Keras mask may be attached to it.
    return leaf if isinstance(leaf, tf.Tensor) else tf.convert_to_tensor(leaf)


def _mask(mask: Any, rows: tf.Tensor) -> tf.Tensor:
    if mask is None:
        return tf.ones([rows.shape[0] if rows.shape[0] is not None else tf.shape(rows)[0]], tf.bool)
    try:
        mask = tf.convert_to_tensor(mask)
    except (TypeError, ValueError) as error:
        raise TypeError(
            f"Expected `mask` to be an array of bools. Received: mask={mask!r}."
        ) from error
    fits = mask.shape.rank == 1 and mask.shape.is_compatible_with(rows.shape[:1])
    if mask.dtype != tf.bool or not fits:
        raise ValueError(
            "Expected `mask` to be boolean of shape (batch,): True for an example, False for "
            f"padding. Received: mask of dtype {mask.dtype.name} and shape "
            f"{tuple(mask.shape)}, with {rows.shape[0]} rows of data"
        )
    return mask
