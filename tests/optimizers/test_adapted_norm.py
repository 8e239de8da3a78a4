"""Adaptive clipping in a run: against NumPy, its noise, its checkpoints, what is refused."""

import keras
import numpy as np
import pytest
import scipy.stats
import tensorflow as tf

import keras_bandmf as bandmf
from keras_bandmf.clipping import AdaptiveClipping
from tests import runs
from tests.training.test_resume import through_checkpoint, through_keras_file, through_weights

MODE = AdaptiveClipping(target_unclipped_quantile=0.4, learning_rate=0.5)
NORMS = np.geomspace(0.1, 20.0, 96).astype(np.float32)


class Norms(keras.callbacks.Callback):
    """Records the clip norm before each step."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def on_train_batch_begin(self, batch, logs=None):
        """Reads it as a user would."""
        self.seen.append(float(self.model.optimizer.current_norm()))


def built(
    plan, make_model=runs.counting_model, replicas=1, clip=2.0, mode=MODE, private=None, **options
):
    """A compiled private model, built, that adapts its clip norm."""
    settings = {"seed": 3, **(private or {})}

    def make():
        model = make_model()
        optimizer = bandmf.BandMFOptimizer(
            keras.optimizers.SGD(1.0), plan, clip, clipping=mode, **settings
        )
        model.compile(optimizer, runs.prediction_loss, **options)
        optimizer.build(model.trainable_variables)
        return model

    return runs.in_scope(replicas, make)


def data():
    """Example i has a gradient of norm NORMS[i], by weight i alone."""
    x, y = runs.counting_data()
    return x * NORMS[:, None], y


def simulated(batches, clip=2.0, steps=24):
    """Clip norms and updates in NumPy, without noise."""
    norm, norms, updates = clip, [], np.zeros((steps, 96))
    for step in range(steps):
        rows = batches.indices(step)
        norms.append(norm)
        updates[step, rows] = NORMS[rows] * np.minimum(1, norm / NORMS[rows]) / 8
        share = np.sum(NORMS[rows] <= 0.95 * norm) / 8
        norm *= np.exp(-0.5 * (share - 0.4))
    return np.array(norms), updates


FIXED = {"sampling": "fixed_order", "max_participations": 2, "min_separation": 12}
INVERSE = {
    **FIXED,
    "num_bands": None,
    "strategy": bandmf.strategies.BandedInverseStrategy([1.0, -0.5], 24),
}


@pytest.mark.parametrize(
    ("replicas", "options", "changes"),
    [
        (1, {"run_eagerly": True}, {}),
        (1, {}, {}),
        (1, {"jit_compile": True}, {}),
        (2, {}, {}),
        (1, {"private": {"noise": "exact"}}, {}),
        (1, {"jit_compile": True}, INVERSE),
    ],
)
def test_a_run_almost_without_noise_is_that_of_numpy(replicas, options, changes):
    plan = runs.make_plan(noise_multiplier=1e-6, **changes)
    model, recorder = built(plan, replicas=replicas, **options), Norms()
    batches = plan.batches(*data(), **({} if changes else {"seed": 5}))
    updates = runs.fit(model, batches, callbacks=[recorder])
    norms, expected = simulated(batches)
    np.testing.assert_allclose(recorder.seen, norms, rtol=1e-3)
    np.testing.assert_allclose(updates, expected, atol=1e-3)
    assert norms.max() / norms.min() > 2  # it moved


def test_the_clip_norm_settles_at_the_quantile():
    """From a hundredth and from a hundred times the median, with the noise of a private run."""
    plan = runs.make_plan(num_steps=96, noise_multiplier=1.0)
    for clip in (0.014, 140.0):
        mode = AdaptiveClipping(0.5, learning_rate=0.4)
        model, recorder = built(plan, clip=clip, mode=mode), Norms()
        runs.fit(model, plan.batches(*data()), epochs=8, callbacks=[recorder])
        late = np.exp(np.mean(np.log(recorder.seen[-24:])))
        share = np.mean(NORMS <= 0.95 * late)
        assert 0.3 < share < 0.7, (clip, late)


@pytest.mark.parametrize("options", [{}, {"jit_compile": True}])
def test_noise_is_that_of_the_first_clip_norm_times_the_ratio(options):
    """Chi-square over 64 steps with rescaled updates; false-alarm rate 1e-4.

    Gradients of zero are not counted, so the clip norm rises.
    """
    plan = runs.make_plan(num_bands=6, num_steps=64, noise_multiplier=2.0)
    model, recorder = built(plan, runs.noise_model, **options), Norms()
    updates = runs.fit(model, plan.batches(*runs.noise_data()), epochs=6, callbacks=[recorder])
    ratios = np.array(recorder.seen) / 2.0
    assert ratios.max() > 2.0
    statistic, degrees = runs.whitened_statistic(plan, updates / ratios[:, None], clip=2.0)
    assert statistic < scipy.stats.chi2.isf(1e-4, degrees)
    # The test can fail: as they were released, the rows have other sizes.
    assert runs.whitened_statistic(plan, updates, clip=2.0)[0] > 2 * degrees


def test_the_count_has_the_noise_of_the_sum():
    """No example is counted, so the count is noise; false-alarm rate 1e-4."""
    plan = runs.make_plan(num_bands=1, num_steps=480, noise_multiplier=1.0)
    model, recorder = built(plan, runs.noise_model, mode=AdaptiveClipping(0.5, 1e-4)), Norms()
    runs.fit(model, plan.batches(*runs.noise_data()), epochs=40, callbacks=[recorder])
    shares = 0.5 - np.diff(np.log(np.array(recorder.seen))) / 1e-4
    noise = 0.3 * 8 * shares
    # The logarithm of a float32 is known to 1e-7, hence the share to 1e-3.
    statistic = np.sum(np.square(noise)) / plan.noise_multiplier**2
    assert scipy.stats.chi2.ppf(5e-5, 479) < statistic < scipy.stats.chi2.isf(5e-5, 479)


def test_the_count_is_charged_for():
    """The noise covers the rounding of one more coordinate."""
    plan = runs.make_plan()
    flat, adaptive = built(plan, mode=bandmf.clipping.FlatClipping()), built(plan)
    noises = [model.optimizer.run_state.noise for model in (flat, adaptive)]
    assert noises[1].layout.shapes[-1] == (1,)
    assert noises[0].stddev < noises[1].stddev < noises[0].stddev * 1.001


@pytest.mark.parametrize("road", [through_weights, through_checkpoint, through_keras_file])
def test_a_restored_run_goes_on_bit_for_bit(road, tmp_path):
    plan = runs.make_plan(noise_multiplier=0.05)
    whole, recorder = built(plan), Norms()
    expected = runs.fit(whole, plan.batches(*data()), callbacks=[recorder])
    replay = {"replay": True}
    model = built(plan, private=replay)
    runs.fit(model, plan.batches(*data()), epochs=1, steps_per_epoch=9)
    restored = road(model, built(plan, private=replay), tmp_path)
    later = Norms()
    updates = runs.fit(restored, plan.batches(*data()), callbacks=[later])
    np.testing.assert_array_equal(updates, expected[9:])
    np.testing.assert_array_equal(later.seen, recorder.seen[9:])


def test_a_checkpoint_from_before_the_plan_goes_into_a_new_run(tmp_path):
    """Its fields are those of a run that adapts its clip norm."""

    def waiting():
        model = runs.counting_model()
        options = {"epsilon": 8.0, "delta": 1e-3, "num_bands": 2, "epochs": 2}
        model.compile(
            bandmf.BandMFOptimizer("sgd", clipping="adaptive", **options), runs.prediction_loss
        )
        model.optimizer.build(model.trainable_variables)
        return model

    model = through_checkpoint(waiting(), waiting(), tmp_path)
    model.fit(*data(), batch_size=8, epochs=1, verbose=0)
    norm = float(model.optimizer.current_norm())
    assert norm != 1.0
    restored = through_checkpoint(model, waiting(), tmp_path)
    assert float(restored.optimizer.current_norm()) == norm


@pytest.mark.parametrize("value", [np.nan, 1e9, 0.0, np.zeros(2, np.float32), np.float64(1.0)])
def test_a_damaged_clip_norm_is_refused(value):
    state = built(runs.make_plan()).optimizer.run_state
    arrays = state.to_arrays()
    arrays["clip_norm"] = np.float32(value) if isinstance(value, float) else value
    if isinstance(value, np.float64):
        arrays["clip_norm"] = value
    with pytest.raises(ValueError, match="clip_norm.*damaged"):
        state.from_arrays(arrays, replay=False)


@pytest.mark.parametrize("road", [through_weights, through_checkpoint])
@pytest.mark.parametrize("modes", [("flat", MODE), (MODE, "flat")])
def test_a_checkpoint_of_another_mode_is_refused(road, modes, tmp_path):
    plan = runs.make_plan()
    model, other = (built(plan, mode=mode) for mode in modes)
    runs.fit(model, plan.batches(*data()), epochs=1)
    with pytest.raises(ValueError, match="belongs to another run"):
        road(model, other, tmp_path)


def test_a_checkpoint_of_an_older_format_is_named():
    state = built(runs.make_plan()).optimizer.run_state
    arrays = state.to_arrays()
    arrays["format"] = np.array(2, np.int32)
    del arrays["clip_norm"]
    with pytest.raises(ValueError, match="format 3.*Received: format=2"):
        state.from_arrays(arrays, replay=False)


def loop_plan():
    return runs.make_plan(**FIXED)


def gradients(model, current, clip=2.0):
    x, y = data()
    return bandmf.clipped_gradients(
        model, x[:8], y[:8], l2_norm_clip=clip, clipping=MODE, current_norm=current
    )


def test_a_loop_of_ones_own():
    model = built(loop_plan())
    optimizer, variables = model.optimizer, model.trainable_variables
    norms = []
    for _ in range(3):
        norms.append(float(optimizer.current_norm()))
        optimizer.apply_clipped(gradients(model, optimizer.current_norm()), variables)
    assert len(set(norms)) == 3 and optimizer.steps_done == 3


def test_gradients_of_another_steps_norm_are_refused():
    model = built(loop_plan())
    optimizer, variables = model.optimizer, model.trainable_variables
    with pytest.raises(bandmf.PrivacyError, match="current_norm=optimizer.current_norm"):
        optimizer.apply_clipped(gradients(model, None), variables)
    with pytest.raises(bandmf.PrivacyError, match="norm of this step.*current_norm=2.5"):
        optimizer.apply_clipped(gradients(model, 2.5), variables)
    assert optimizer.steps_done == 0
    assert not variables[0].numpy().any()

    @tf.function
    def step(norm):
        optimizer.apply_clipped(gradients(model, norm), variables)

    step(optimizer.current_norm())
    assert np.isfinite(variables[0].numpy()).all()
    step(tf.constant(0.7))
    assert np.isnan(variables[0].numpy()).all()


def test_in_a_graph_the_norm_is_asked_for_after_the_build():
    optimizer = bandmf.BandMFOptimizer("sgd", loop_plan(), 2.0, clipping="adaptive")
    assert float(optimizer.current_norm()) == 2.0
    with pytest.raises(ValueError, match="before it is built"):
        tf.function(optimizer.current_norm)()
    assert bandmf.BandMFOptimizer("sgd", loop_plan()).current_norm() is None


def test_a_step_beyond_the_plan_leaves_the_norm():
    plan = runs.make_plan(
        num_bands=1, num_steps=1, sampling="fixed_order", max_participations=1, min_separation=1
    )
    model = built(plan)
    optimizer, variables = model.optimizer, model.trainable_variables

    @tf.function
    def step():
        optimizer.apply_clipped(gradients(model, optimizer.current_norm()), variables)
        return optimizer.current_norm()

    first = float(step())
    assert first != 2.0
    assert float(step()) == first
    assert np.isnan(variables[0].numpy()).all()


def test_settings_that_do_not_go_together_are_refused():
    with pytest.raises(ValueError, match="NoiseAwareAdam.*adaptive"):
        bandmf.BandMFOptimizer(bandmf.NoiseAwareAdam(), runs.make_plan(), clipping="adaptive")
    central = tf.distribute.experimental.CentralStorageStrategy(["CPU:0", "CPU:1"])
    with central.scope():
        model = runs.counting_model()
        optimizer = bandmf.BandMFOptimizer("sgd", runs.make_plan(), clipping="adaptive")
        with pytest.raises(ValueError, match="CentralStorageStrategy.*Mirrored"):
            optimizer.build(model.trainable_variables)
        assert not optimizer.built


def test_the_statement_names_the_mode_and_its_first_norm():
    model = built(runs.make_plan(noise_multiplier=1.0))
    runs.fit(model, model.optimizer.plan.batches(*data()), epochs=1)
    text = " ".join(str(bandmf.statement(model)).split())
    assert "adaptive: an example's gradient is multiplied by 2 / max(its norm, a clip" in text
    assert "0.4 quantile" in text and "sensitivity 2" in text


def test_the_mode_survives_the_config():
    optimizer = bandmf.BandMFOptimizer("sgd", runs.make_plan(), clipping=MODE)
    config = keras.saving.serialize_keras_object(optimizer)
    other = keras.saving.deserialize_keras_object(config)
    assert other.clipping == MODE
    assert keras.saving.serialize_keras_object(other) == config


def test_low_rank_carriers():
    """The count comes after the coordinates of the carriers, in which the norms are taken."""
    plan = runs.make_plan(num_bands=1, noise_multiplier=1e-6)

    def make_model():
        keras.utils.set_random_seed(0)
        model = keras.Sequential(
            [keras.Input((96,)), keras.layers.Dense(20), keras.layers.Dense(1)]
        )
        bandmf.enable_rgp(model, rank=2, warmup_steps=24)
        return bandmf.privatize(model)

    batches, (x, y) = plan.batches(*data(), seed=5), data()
    rows = batches.indices(0)
    norms = bandmf.clipped_gradients(built(plan, make_model), x[rows], y[rows]).norms.numpy()
    clip = float(np.median(norms)) * 1.1
    share = np.sum(norms <= 0.95 * clip) / 8
    assert 0 < share < len(rows) / 8
    model, recorder = built(plan, make_model, clip=clip), Norms()
    updates = runs.fit(model, batches, callbacks=[recorder])
    assert recorder.seen[1] == pytest.approx(clip * np.exp(-0.5 * (share - 0.4)), rel=1e-4)
    assert np.isfinite(updates).all()


def test_outside_of_the_scope_a_worker_reads_its_own_copy():
    """Where its first replica is not the first of all."""
    adapted = built(runs.make_plan()).optimizer.run_state.adapted
    adapted._first_replica = 2
    assert float(adapted.read()) == 2.0
