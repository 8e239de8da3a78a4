"""Clip norms that float32 cannot hold are refused; at the least of the others the clip holds."""

import keras
import numpy as np
import pytest

import keras_bandmf as bandmf
from keras_bandmf.clipping.norms import LARGEST_CLIP_NORM, LEAST_CLIP_NORM, largest_contribution
from tests import runs


def tiny_gradients(clip, scale):
    """The clipped sum of one example whose gradient has entries of size `scale`."""
    model = keras.Sequential([keras.Input((100,)), keras.layers.Dense(100, use_bias=False)])
    x = np.full((1, 100), scale, np.float32)
    clipped = bandmf.clipped_gradients(
        model, x, np.zeros(1, np.float32), l2_norm_clip=clip, loss=lambda y, p: p[:, :100] @ ONES
    )
    return np.linalg.norm(np.asarray(clipped.sums[0], np.float64))


ONES = np.ones((100, 1), np.float32)


@pytest.mark.parametrize("clip", [1e-20, 1e-30, 1e-38, 9e-7, 1.2e18, 1e30])
def test_clip_norms_beyond_float32_are_refused(clip):
    """At 1e-20 a contribution was ten times the clip norm: its squares vanish."""
    with pytest.raises(ValueError, match="l2_norm_clip"):
        bandmf.BandMFOptimizer("sgd", runs.make_plan(), l2_norm_clip=clip)
    with pytest.raises(ValueError, match="l2_norm_clip"):
        tiny_gradients(clip, 1e-20)


@pytest.mark.parametrize("clip", [LEAST_CLIP_NORM, LARGEST_CLIP_NORM])
@pytest.mark.parametrize("scale", [1e-22, 1e-20, 1e-18, 1e-12, 1e-9, 1e-8, 1e-6, 1e-3, 1.0, 1e6])
def test_the_clip_holds_at_the_ends(clip, scale):
    assert tiny_gradients(clip, scale) <= largest_contribution(clip, clip, 1) * (1 + 1e-6)


def test_what_squares_may_hide_is_charged():
    assert largest_contribution(1.0, 1.0, 100) == pytest.approx(1.0, abs=1e-11)
    assert largest_contribution(1e-6, 1e-6, 100) == pytest.approx(np.sqrt(2.0) * 1e-6)
