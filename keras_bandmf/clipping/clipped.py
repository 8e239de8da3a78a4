"""Per-example gradients, clipped and summed: what the private step starts from."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, Literal

import keras
import tensorflow as tf

from keras_bandmf.clipping.checks.refusals import (
    checked_microbatch_size,
    refuse_model,
    refuse_short_products,
    refuse_sparse_data,
)
from keras_bandmf.clipping.clipper import Clipper, accumulation_dtype
from keras_bandmf.clipping.factors import Unsupported
from keras_bandmf.clipping.losses import batch_loss, build_loss
from keras_bandmf.clipping.modes import ClippingMode, ClippingName, checked_mode
from keras_bandmf.clipping.norms import checked_clip_norm
from keras_bandmf.clipping.passes import in_passes, with_row_numbers
from keras_bandmf.clipping.paths.book_keeping import clip_by_book_keeping
from keras_bandmf.clipping.paths.chunks import clip_at_once, clip_in_chunks
from keras_bandmf.clipping.paths.microbatches import rows_at_a_time
from keras_bandmf.clipping.paths.per_example import clip_one_example
from keras_bandmf.clipping.paths.routing import give_up, route_of
from keras_bandmf.clipping.seeds import MaskSeeds
from keras_bandmf.clipping.shapes import on_tensors


class Origin:
    """The model that gradients were taken at, and its variables: compared by identity."""

    def __init__(self, model: Any):
        self.model = model
        self.variables = tuple(model.trainable_variables)

    def belongs_to(self, variables: Any) -> bool:
        """Whether these are the very variables, in their order."""
        return [id(v) for v in self.variables] == [id(v) for v in variables]

    def __eq__(self, other: Any) -> bool:
        same = isinstance(other, Origin) and self.model is other.model
        return same and self.belongs_to(other.variables)

    def __hash__(self) -> int:
        return hash((id(self.model), *(id(v) for v in self.variables)))


@dataclasses.dataclass(frozen=True, kw_only=True)
class ClippedGradients:
    """Clipped gradients of one batch, summed over its examples.

    Only `clipped_gradients` makes them; an optimizer that takes nothing else knows that every
    example was clipped. They pass through `tf.function`.

    Attributes:
        sums: one tensor per entry of `model.trainable_variables`, in its shape (a vector of
            coordinates for a kernel with low-rank carriers): the SUM over examples, never a mean;
            float32, or float64 with `float64_sums` or if the model has float64 variables.
        norms: (batch,) gradient norms before clipping. Not private: for tests and diagnosis.
        losses: (batch,) the loss of each example, masked ones included. Not private.
        was_clipped: (batch,) bool, whether clipping made the gradient smaller or dropped it; False
            for padding. Not private.
        outputs: what the model returned in the training forward pass. Not private.
        mask: (batch,) bool; False marks padding, which contributed zero.
        rows_mixed: scalar bool: the loss of one row was seen to depend on another row, so that
            clipping bounds nothing, and `sums` must not be used. `apply_clipped` makes the update
            NaN.
        l2_norm_clip: the largest norm of one example's contribution.
        clipping: the clipping mode.
        origin: the model, and the variables whose gradients these are.
    """

    sums: list[tf.Tensor]
    norms: tf.Tensor
    losses: tf.Tensor
    was_clipped: tf.Tensor
    outputs: Any
    mask: tf.Tensor
    rows_mixed: tf.Tensor
    l2_norm_clip: float
    clipping: ClippingMode
    origin: Origin

    def __tf_flatten__(self) -> tuple:
        """TensorFlow's protocol for structures: (constants, tensors)."""
        constants = (self.l2_norm_clip, self.clipping, self.origin)
        rows = (self.norms, self.losses, self.was_clipped, self.outputs, self.mask)
        return constants, (list(self.sums), *rows, self.rows_mixed)

    @classmethod
    def __tf_unflatten__(cls, constants: tuple, tensors: tuple) -> ClippedGradients:
        """The inverse of `__tf_flatten__`."""
        sums, norms, losses, was_clipped, outputs, mask, rows_mixed = tensors
        return cls(
            sums=list(sums),
            norms=norms,
            losses=losses,
            was_clipped=was_clipped,
            outputs=outputs,
            mask=mask,
            rows_mixed=rows_mixed,
            l2_norm_clip=constants[0],
            clipping=constants[1],
            origin=constants[2],
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
) -> ClippedGradients:
    """Clip the gradient of every example to norm `l2_norm_clip` and sum.

    The gradient of example i is that of the loss Keras would compute on a batch holding example i
    alone: sample weights, temporal weights, Keras masks, several outputs and loss weights included;
    weight regularizers (data-independent) and the factor 1 / replicas of a strategy excluded. By
    default its norm is taken over all trainable variables jointly, and it is multiplied by
    min(1, l2_norm_clip / norm) (Abadi et al., 2016); `clipping` chooses other factors.

    Models whose layers all have a clipping rule take the book-keeping path, one forward and one
    backward pass (Bu et al., 2023); any other goes one example at a time. `explain(model)` tells
    which, and why. Works in eager mode, `tf.function`, XLA and a replica context. In eager mode the
    Python code of model and loss sees the rows themselves, and what it keeps of them has no noise:
    call this inside a `tf.function` that gets the rows as arguments.

    Args:
        model: a built Keras model; compiled, unless `loss` is given.
        x: inputs: array, tensor or a structure of them; the example is axis 0.
        y: targets in the same way, or None.
        sample_weight: None, weights of shape (batch,) or (batch, time), or a structure per output.
        l2_norm_clip: largest norm of one example's contribution; a constant of the run.
        clipping: "flat", "per_layer" (equal shares), "automatic" (normalised gradients), or a
            mode with settings: `clipping.PerLayerClipping`, `clipping.AutomaticClipping`. The bound
            is `l2_norm_clip` in each of them.
        mask: (batch,) bool, False for padding; None if every row is an example.
        microbatch_size: the most examples worked on at a time; None for all, "auto" for as many as
            fit into 1 GiB (`microbatches.rows_at_a_time` has the rule). Changes memory, never the
            result (dropout masks apart). Need not divide the batch.
        loss: None for the compiled loss; else a name, a `keras.losses.Loss` or a function
            (y_true, y_pred), for a model with one output.
        mask_seeds: where dropout masks and other random numbers of the forward pass come from: a
            secret key and the step, which the private `fit` passes. With None Keras's own seed
            generators serve. That is enough where each row has a fixed place and neighbouring data
            differ by the mask of one row (`sampling="fixed_order"`, for which alone a loop of
            one's own is accepted): masks belong to places, and no place changes. Where the rows of
            a batch are sampled it is not: one row more gives all others new masks.
        float64_sums: compute norms and sums in float64, from the activations and gradients of the
            pass. `noise="exact"` asks for it. Products of matrices then take about five times as
            long on a processor, and memory twice as much.

    Returns:
        `ClippedGradients`.

    Raises:
        ValueError: no loss; bad clip norm, mode, microbatch size or mask; ragged or sparse data; a
            layer that is known to mix examples; float16; `mean_with_sample_weight` with weights;
            a GPU that may round float32 products to TensorFloat-32; in a graph, a pass that writes
            a variable or draws random numbers otherwise (`captures.Watch`).

    Formal guarantees: adding or removing one row, or setting its mask, changes `sums` by a vector
    of joint norm at most `l2_norm_clip`, up to rounding (`noise.lattice.charged_norm` says of which
    size, and what is proved of it). By construction: a model of layers and
    operations known to treat rows independently (`rowwise`), whose tensors have the declared shapes
    in the very trace that runs, takes the book-keeping path, any other goes
    one row at a time. It rests on a promise only where a layer was declared row-wise. Rows
    that are masked out, or whose gradient is not finite, contribute exactly zero and leave the
    others as they were. On the book-keeping path masked rows are sentinels besides: a gradient at
    one of their activations sets `rows_mixed` (`clip_by_book_keeping` says what this cannot see).
    Without masked rows, as in a direct call without `mask`, there is no sentinel. With random
    layers this holds for each value of the masks: with `mask_seeds` whatever places the rows stand
    at (`MaskSeeds` has the proof), without them for setting the mask of a row only. `norms`,
    `losses`, `was_clipped` and `outputs` carry no guarantee.
    """
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
) -> ClippedGradients:
    """`clipped_gradients` whose `sums` are float64 where they were added up in it, else float32.

    The noise adds in float64 anyway: to round before costs two passes over a large table.
    """
    clip = checked_clip_norm(l2_norm_clip)
    size = checked_microbatch_size(microbatch_size)
    refuse_sparse_data(x, y, sample_weight)
    refuse_short_products()
    mode = checked_mode(clipping)
    refuse_model(model, sample_weight, loss)
    x, y, sample_weight = on_tensors(_tensor, (x, y, sample_weight))
    rows = next(t for t in keras.tree.flatten(x) if t is not None)
    mask = _mask(mask, rows)
    if not model.built:
        raise ValueError(
            "Expected a built model: its variables are needed. Call it once on data, or start it "
            f"with `keras.Input`. Received: model '{model.name}' that is not built"
        )
    build_loss(model, x, y)
    row_loss = batch_loss(model, loss)
    general = route_of(model, x, y, sample_weight, loss).general
    clipper = Clipper.of(model, clip, mode, float64_sums)
    data = (with_row_numbers(x, mask), y, sample_weight, mask)
    result = None
    if general is None:
        way = functools.partial(clip_by_book_keeping, model, clipper=clipper, loss=row_loss)
        by_batch = in_passes(way, model, mask_seeds)
        try:
            if size == "auto":
                size = rows_at_a_time(model, x, y, sample_weight, loss)
            if size is None:
                result = clip_at_once(by_batch, *data)
            else:
                result = clip_in_chunks(by_batch, *data, size)
        except Unsupported as reason:
            # What the trial trace could not see (other shapes, another kind of graph).
            give_up(model, str(reason))
    if result is None:
        way = functools.partial(clip_one_example, model, clipper=clipper, loss=row_loss)
        result = clip_in_chunks(in_passes(way, model, mask_seeds), *data, 1)
    return ClippedGradients(
        **result._asdict(), mask=mask, l2_norm_clip=clip, clipping=mode, origin=Origin(model)
    )


def _tensor(leaf: Any) -> tf.Tensor:
    # A tensor stays the same object: a Keras mask may hang on it.
    return leaf if isinstance(leaf, tf.Tensor) else tf.convert_to_tensor(leaf)


def _mask(mask: Any, rows: tf.Tensor) -> tf.Tensor:
    if mask is None:
        return tf.ones([rows.shape[0] if rows.shape[0] is not None else tf.shape(rows)[0]], tf.bool)
    mask = tf.convert_to_tensor(mask)
    fits = mask.shape.rank == 1 and mask.shape.is_compatible_with(rows.shape[:1])
    if mask.dtype != tf.bool or not fits:
        raise ValueError(
            "`mask` must be boolean of shape (batch,): True for an example, False for padding. "
            f"Received: mask of dtype {mask.dtype.name} and shape {tuple(mask.shape)}, with "
            f"{rows.shape[0]} rows of data"
        )
    return mask
