"""Tasks of keras_hub as their users know them: raw rows in, LoRA or all weights, files out."""

import warnings

import keras
import numpy as np
import pytest
import tensorflow as tf

import keras_bandmf as bandmf
from keras_bandmf import clipping
from tests import hub, runs
from tests.clipping import reference

pytest.importorskip("keras_hub")

LINES = np.array(hub.LINES)
IMAGES = np.random.default_rng(0).uniform(0, 255, (16, 8, 8, 3)).astype(np.float32)
TASKS = {
    "bert_classifier": (hub.TEXTS, hub.LABELS),
    "gpt2": (LINES,),
    "gemma": (LINES,),
    "llama": (LINES,),
    "image_classifier": (IMAGES, hub.LABELS),
}
CAUSAL = ("gpt2", "gemma", "llama")
LOGITS = keras.losses.SparseCategoricalCrossentropy(from_logits=True)


def make(name, rank=None):
    """A task with its preprocessor, and with LoRA of that rank on its backbone."""
    if name in ("gemma", "llama"):
        pytest.importorskip("sentencepiece")
    model = getattr(hub, name)()
    if rank is not None:
        model.backbone.enable_lora(rank)
    return model


def compiled(model, plan=None, **options):
    """A private task; the preset's own loss, metrics and sampler where it has any."""
    target = {"plan": plan} if plan else {"epsilon": 8.0, "delta": 1e-3, "num_bands": 2}
    seed = options.pop("seed", None)
    optimizer = bandmf.BandMFOptimizer(
        keras.optimizers.Adam(0.01), **target, seed=seed, replay=options.pop("replay", False)
    )
    if not hasattr(model, "generate"):
        options = {"loss": LOGITS} | options
    model.compile(optimizer=optimizer, **options)
    return bandmf.privatize(model)


def values(variables):
    return [np.array(v) for v in variables]


@pytest.mark.parametrize("rank", [None, 2], ids=["all", "lora"])
@pytest.mark.parametrize(
    "name",
    [pytest.param(n, marks=[] if n == "gpt2" else pytest.mark.slow) for n in TASKS],
)
def test_from_raw_rows_to_an_export(name, rank, tmp_path):
    if (name, rank) == ("gpt2", None):
        pytest.skip("tests/training/test_hub_tasks.py has it")
    data, rows = TASKS[name], TASKS[name][0]
    model = make(name, rank)
    compiled(model)
    before = {v.path: np.array(v) for v in model.weights}
    model.fit(*data, batch_size=4, verbose=0, validation_data=data)
    assert model.optimizer.steps_done == model.optimizer.plan.num_steps == 4
    assert clipping.explain(model).why == "checked against one example at a time"

    trained = {v.path for v in model.trainable_variables}
    assert rank is None or {path.rsplit("/")[-1][:4] for path in trained} >= {"lora"}
    moved = {v.path for v in model.weights if not np.array_equal(before[v.path], v)}
    assert moved == trained

    loss = model.evaluate(*data, verbose=0)[0]
    assert model.history.history["val_loss"][-1] == pytest.approx(loss, rel=1e-4)
    predicted = model.predict(rows, verbose=0)
    if name in CAUSAL:
        assert model.generate("a b", max_length=6).startswith("a b")
    statement = bandmf.statement(model)
    assert statement.private and statement.epsilon <= 8.0

    spec = tf.TensorSpec([None, *rows.shape[1:]], tf.string if rows is not IMAGES else tf.float32)
    bandmf.export(model, tmp_path / "served", raw_rows=spec)
    served = tf.saved_model.load(str(tmp_path / "served"))
    answers = served.serve(tf.constant(rows))
    np.testing.assert_allclose(answers, predicted, rtol=1e-4, atol=1e-5)
    held = runs.all_bytes(tmp_path / "served")
    assert not [secret for secret in runs.secrets(model) if secret in held]
    model.save(tmp_path / "task.keras")
    loaded = keras.models.load_model(tmp_path / "task.keras", compile=False)
    np.testing.assert_allclose(loaded.predict(rows, verbose=0), predicted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("options", "error", "match"),
    [
        ({"raw_rows": "texts"}, TypeError, r"`raw_rows` to be a `tf.TensorSpec`.*tf.string"),
        ({"raw_rows": tf.TensorSpec([None]), "verbose": 1}, TypeError, "further options.*verbose"),
        ({"raw_rows": tf.TensorSpec([None], tf.string)}, ValueError, "task of keras_hub.*none"),
    ],
)
def test_exports_of_raw_rows_that_are_refused(options, error, match, tmp_path):
    model = make("gpt2")
    if error is ValueError:
        model.preprocessor = None
    with pytest.raises(error, match=match):
        bandmf.export(model, tmp_path / "served", **options)
    assert not list(tmp_path.iterdir())


def moved_away(model):
    """Moves all trained weights: zeros would hide what the others do."""
    random = np.random.default_rng(0)
    for v in model.trainable_variables:
        v.assign(v + 0.3 * random.normal(size=v.shape))


@pytest.mark.parametrize("rank", [None, 2], ids=["all", "lora"])
@pytest.mark.parametrize("name", CAUSAL)
def test_padding_counts_for_nothing_and_a_row_for_itself(name, rank):
    """The weights of tokens come from the preprocessor: 0 where there is padding."""
    model = make(name, rank)
    model.compile()
    moved_away(model)
    x, y, weights = model.preprocess_samples(hub.LINES[:4])
    weights = np.asarray(weights, np.float32)
    assert 0 < weights.mean() < 1
    per_example, losses = reference.gradients(model, x, y, weights)
    clip = float(np.median(reference.clipped(per_example, 1.0)[0]))
    norms, sums = reference.clipped(per_example, clip)
    found = clipping.clipped_gradients(model, x, y, weights, l2_norm_clip=clip)
    assert reference.error(found.sums, sums) < 1e-5
    np.testing.assert_allclose(found.norms, norms, rtol=1e-5)
    np.testing.assert_allclose(found.losses, losses, rtol=1e-5)
    # As Keras says: the mean over all tokens of a row, those of padding with the weight 0.
    one_by_one = [model.evaluate(LINES[i : i + 1], verbose=0)[0] for i in range(4)]
    np.testing.assert_allclose(found.losses, one_by_one, rtol=1e-5)

    elsewhere = np.where(weights, y, (np.asarray(y) + 1) % 5)
    other = clipping.clipped_gradients(model, x, elsewhere, weights, l2_norm_clip=clip)
    np.testing.assert_array_equal(other.norms, found.norms)
    unweighted = clipping.clipped_gradients(model, x, y, l2_norm_clip=clip)
    assert np.all(np.abs(unweighted.norms / found.norms - 1) > 1e-3)


PLAN = runs.make_plan(num_examples=16, batch_size=4, num_steps=8, num_bands=2)


def test_keras_files_do_not_keep_the_factors(tmp_path):
    """What Keras does, which the refusals and the page on language models rest on."""
    model = make("gpt2", 2)
    moved_away(model)
    model.save_weights(tmp_path / "model.weights.h5")
    other = make("gpt2", 2)
    other.load_weights(tmp_path / "model.weights.h5")
    np.testing.assert_allclose(other.predict(LINES), model.predict(LINES), rtol=1e-4, atol=1e-5)
    factors = [v for v in other.trainable_variables if "lora" in v.name]
    assert factors and not any(np.any(v) for v in factors)

    compiled(other, PLAN)
    with pytest.raises(ValueError, match="LoRA to begin with a first factor that is not zero") as e:
        other.fit(LINES, verbose=0)
    assert not other.optimizer.built
    line = str(e.value).split("draw the first factors anew: `")[1].split("`")[0]
    exec(line, {"keras": keras, "model": other})
    other.fit(LINES, epochs=1, steps_per_epoch=1, verbose=0)
    assert other.optimizer.steps_done == 1


def quantized_gpt2(filters=None):
    model = make("gpt2")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # layers that Keras does not quantize
        model.backbone.quantize("int8", filters=filters)
    model.backbone.enable_lora(2)
    return model


def test_quantized_tables_that_give_the_logits_are_refused():
    model = compiled(quantized_gpt2(), PLAN)
    with pytest.raises(ValueError, match=r"quantized table.*logits.*`model.backbone.quantize\("):
        model.fit(LINES, verbose=0)
    assert not model.optimizer.built
    # What Keras does, on which the refusal rests.
    hidden = tf.random.normal([1, 3, 8])
    with tf.GradientTape() as tape:
        tape.watch(hidden)
        logits = tf.square(model.backbone.token_embedding(hidden, reverse=True))
    slopes = tape.gradient(logits, hidden)
    np.testing.assert_array_equal(np.count_nonzero(slopes, axis=-1), [[1, 1, 1]])
    np.testing.assert_array_equal(np.argmax(np.abs(slopes), -1), np.argmax(np.abs(hidden), -1))


@pytest.mark.slow
def test_a_quantized_base_is_trained_on_the_fast_path():
    model = quantized_gpt2(lambda layer: not isinstance(layer, keras.layers.Embedding))
    compiled(model, PLAN)
    before = {v.path: np.array(v) for v in model.weights}
    model.fit(LINES, verbose=0)
    assert clipping.explain(model).route == "book-keeping"
    moved = {v.path for v in model.weights if not np.array_equal(before[v.path], v)}
    assert moved == {v.path for v in model.trainable_variables}
    assert model.generate("a b", max_length=6).startswith("a b")


def test_a_backup_that_would_lose_the_factors_is_refused(tmp_path):
    model = compiled(make("gpt2", 2), PLAN)
    backup = keras.callbacks.BackupAndRestore(tmp_path / "backup")
    with pytest.raises(ValueError, match="BackupAndRestore cannot restore.*CheckpointManager"):
        model.fit(LINES, verbose=0, callbacks=[backup])
    assert not model.optimizer.built


@pytest.mark.slow
def test_a_checkpoint_goes_on_with_the_factors(tmp_path):
    """As the message of the refusal says. The seed makes both runs draw the same noise."""

    def fresh():
        model = compiled(make("gpt2", 2), PLAN, seed=3, replay=True)
        checkpoint = tf.train.Checkpoint(model=model, optimizer=model.optimizer)
        return model, tf.train.CheckpointManager(checkpoint, tmp_path / "run", max_to_keep=1)

    whole = compiled(make("gpt2", 2), PLAN, seed=3, replay=True)
    whole.fit(LINES, epochs=2, verbose=0)
    first, manager = fresh()
    saving = keras.callbacks.LambdaCallback(on_epoch_end=lambda epoch, logs: manager.save())
    first.fit(LINES, epochs=1, verbose=0, callbacks=[saving])
    second, manager = fresh()
    second.optimizer.build(second.trainable_variables)
    manager.checkpoint.restore(manager.latest_checkpoint)
    second.fit(LINES, verbose=0)
    assert second.optimizer.steps_done == 8
    for a, b in zip(values(whole.weights), values(second.weights), strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.slow
def test_a_second_run_from_a_file_is_composed_with_the_first(tmp_path):
    model = compiled(make("gpt2", 2), PLAN)
    model.fit(LINES, verbose=0)
    model.save(tmp_path / "first.keras")
    loaded = keras.models.load_model(tmp_path / "first.keras", compile=False)
    loaded.backbone.enable_lora(2)
    bandmf.privatize(loaded, history=tmp_path / "first.keras")
    compiled(loaded, PLAN)
    loaded.fit(LINES, verbose=0)
    statement = bandmf.statement(loaded)
    assert len(statement.runs) == 2
    assert statement.epsilon > bandmf.statement(model).epsilon


@pytest.mark.slow
def test_merged_weights_hold_no_secret_and_serve_in_a_plain_model(tmp_path):
    model = compiled(make("gpt2", 2), PLAN)
    model.fit(LINES, verbose=0)
    model.backbone.save_weights(tmp_path / "merged.weights.h5")
    model.backbone.save_lora_weights(tmp_path / "adapter.lora.h5")
    plain = make("gpt2")
    plain.backbone.load_weights(tmp_path / "merged.weights.h5")
    expected = model.predict(LINES, verbose=0)
    np.testing.assert_allclose(plain.predict(LINES, verbose=0), expected, rtol=1e-4, atol=1e-5)
    held = runs.all_bytes(tmp_path)
    assert not [secret for secret in runs.secrets(model) if secret in held]
