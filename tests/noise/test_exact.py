"""Exactly rounded noise: against 60 digits, and the same as the default but for near ties."""

import decimal
import math

import keras
import numpy as np
import pytest
import tensorflow as tf

import keras_bandmf as bandmf
from keras_bandmf.noise import CorrelatedNoise, exact, normals
from keras_bandmf.strategies import ToeplitzStrategy
from tests import runs


def test_directions_and_radii_are_those_of_the_library():
    for numerator in (-(2**38) + 1, -5, 1, 12345678901, 2**38 - 1):
        cosine, sine = exact.direction(numerator, 38)
        angle = numerator / 2**38 * math.pi / 4
        assert float(cosine) == pytest.approx(math.cos(angle), rel=1e-14)
        assert float(sine) == pytest.approx(math.sin(angle), rel=1e-14)
        assert abs(cosine**2 + sine**2 - 1) < decimal.Decimal("1e-26")
    assert float(exact.root_of_log(1, 89)) == pytest.approx(math.sqrt(2 * 89 * math.log(2)))


def test_exact_rows_differ_from_default_ones_only_at_near_ties():
    """The program of the exact noise settles most values; the default's cheaper series few less."""
    strategy = ToeplitzStrategy([1.0, 0.6, 0.4], 4)
    default, exactly = (
        CorrelatedNoise(strategy, 1.5, [(200_000,)], seed=3, exact=choice)
        for choice in (False, True)
    )
    zero = tf.constant(0, tf.int64)
    doubtful = np.repeat(exactly._doubtful(zero, 0).numpy(), 2)[:200_000]
    assert 0 < doubtful.sum() < 200
    unsettled = exactly._row(zero, 0).numpy().view(np.int32)[:200_000]
    default.next(), exactly.next()
    settled = exactly.get_ring()[0]
    assert np.abs(unsettled - settled).max() <= 1
    assert not (unsettled - settled)[~doubtful].any()
    differ = default.get_ring()[0] - settled
    assert np.abs(differ).max() <= 1
    # Off by 2^-33 of 2^22 steps: one value of 2^11.
    assert 0 < np.mean(differ != 0) < 2.0**-10


def test_all_values_computed_anew_are_those_of_the_program():
    """`rounded_pairs` where nothing is near a tie: the same integers, ring and signs included."""
    strategy = ToeplitzStrategy([1.0, 0.6, 0.4], 8)
    noise = CorrelatedNoise(strategy, 1.5, [(normals.CHUNK,)], seed=3)
    for _ in range(4):
        noise.next()
    step = tf.constant(4, tf.int64)
    ring = noise.get_ring().reshape(2, -1, 2)
    indices = np.arange(200)
    found = exact.rounded_pairs(
        noise._key.numpy(), np.int64(4), indices, noise._coefficients(step).numpy(), ring[:, :200]
    )
    row = noise._row(step, 0).numpy().view(np.int32).reshape(-1, 2)[:200]
    clear = ~noise._doubtful(step, 0).numpy()[:200]
    np.testing.assert_array_equal(found[clear], row[clear])


def fitted(noise, jit_compile=False):
    plan = runs.make_plan()
    model = runs.counting_model()
    optimizer = bandmf.BandMFOptimizer(keras.optimizers.SGD(1.0), plan, noise=noise)
    model.compile(optimizer, loss=runs.prediction_loss, jit_compile=jit_compile)
    model.fit(plan.batches(*runs.counting_data()), epochs=1, verbose=0)
    assert np.isfinite(model.trainable_variables[0].numpy()).all()
    return optimizer


@pytest.mark.parametrize("jit_compile", [False, True])
def test_a_fit_with_exact_noise_is_private_training_and_named(jit_compile):
    """In the config and in the statement."""
    optimizer = fitted("exact", jit_compile)
    assert optimizer.run_state.noise.exact
    assert bandmf.BandMFOptimizer.from_config(optimizer.get_config()).noise == "exact"
    assert "noise rounded exactly" in optimizer._record.statement().mechanism


def test_a_run_that_had_default_noise_is_not_said_to_be_exact():
    default, exactly = fitted("default"), fitted("exact")
    assert "exactly" not in default._record.statement().mechanism
    exactly._record.take_over(default._record.to_facts())
    assert "exactly" not in exactly._record.statement().mechanism
    resumed, before = fitted("exact"), fitted("exact")
    resumed._record.take_over(before._record.to_facts())
    assert "noise rounded exactly" in resumed._record.statement().mechanism


@pytest.mark.parametrize("nested", [False, True])
def test_exact_noise_in_a_program_of_xla_is_refused(nested):
    noise = CorrelatedNoise(ToeplitzStrategy([1.0, 0.5], 8), 1.0, [(5,)], exact=True)
    step = tf.function(noise.next) if nested else noise.next
    with pytest.raises(ValueError, match="XLA cannot compile. Received: a step inside"):
        tf.function(step, jit_compile=True)()


def test_another_name_of_noise_is_refused():
    with pytest.raises(ValueError, match="Received: noise='fine'"):
        bandmf.BandMFOptimizer("sgd", runs.make_plan(), noise="fine")
