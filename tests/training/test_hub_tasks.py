"""A private task of keras_hub takes raw rows, as its own `fit`, `evaluate` and `predict` do."""

import keras
import numpy as np
import pytest
import tensorflow as tf

import keras_bandmf as bandmf
from keras_bandmf.training import task_data
from tests import hub, runs

keras_hub = pytest.importorskip("keras_hub")

TEXTS, LABELS = hub.TEXTS, hub.LABELS
PLAN = runs.make_plan(num_examples=16, batch_size=4, num_steps=8, num_bands=2)


def private(make=hub.classifier, plan=PLAN, **options):
    """A private task of a seeded run, compiled as its author compiles it."""
    model = bandmf.privatize(make())
    inner = keras.optimizers.SGD(0.5)
    optimizer = bandmf.BandMFOptimizer(inner, plan, l2_norm_clip=1.0, seed=3)
    model.compile(optimizer=optimizer, **options)
    return model


def weights_after(model, *data, **options):
    model.fit(*data, verbose=0, **options)
    return np.concatenate([np.ravel(w) for w in model.get_weights()])


@pytest.fixture(scope="module")
def expected():
    """The weights of a run whose rows were preprocessed by hand."""
    model = private()
    batches = PLAN.batches(TEXTS, LABELS, preprocess=model.preprocess_samples)
    return weights_after(model, batches, epochs=2)


@pytest.mark.parametrize("options", [{}, {"jit_compile": True}, {"run_eagerly": True}], ids=str)
def test_raw_strings_train_validate_and_predict(options, expected):
    model = private(**options)
    history = model.fit(
        PLAN.batches(TEXTS, LABELS), epochs=2, validation_data=(TEXTS, LABELS), verbose=0
    )
    found = np.concatenate([np.ravel(w) for w in model.get_weights()])
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)
    loss, _ = model.evaluate(TEXTS, LABELS, verbose=0)
    assert history.history["val_loss"][-1] == pytest.approx(loss, rel=1e-4)
    assert model.predict(list(TEXTS[:3]), verbose=0).shape == (3, 2)


@pytest.mark.slow
def test_bert_itself():
    model = private(hub.bert_classifier)
    found = weights_after(
        model, PLAN.batches(TEXTS, LABELS), epochs=2, validation_data=(TEXTS, LABELS)
    )
    theirs = private(hub.bert_classifier)
    batches = PLAN.batches(TEXTS, LABELS, preprocess=theirs.preprocess_samples)
    np.testing.assert_array_equal(found, weights_after(theirs, batches, epochs=2))
    loss, _ = model.evaluate(TEXTS, LABELS, verbose=0)
    assert model.history.history["val_loss"][-1] == pytest.approx(loss, rel=1e-4)


LISTS = TEXTS.tolist(), LABELS.tolist()


@pytest.mark.parametrize(
    "validation_data",
    [
        LISTS,
        (TEXTS, LABELS, np.ones(16)),
        tf.data.Dataset.from_tensor_slices((TEXTS, LABELS)).batch(4),
    ],
    ids=["lists", "weighted", "dataset"],
)
def test_rows_as_in_the_own_fit_of_the_task(validation_data, expected):
    model = private()
    given = {"epochs": 2, "batch_size": 4, "validation_data": validation_data}
    np.testing.assert_array_equal(weights_after(model, *LISTS, **given), expected)
    loss, _ = model.evaluate(*LISTS, verbose=0)
    assert model.history.history["val_loss"][-1] == pytest.approx(loss, rel=1e-5)


def test_a_dataset_of_single_texts_makes_its_plan():
    model = bandmf.privatize(hub.classifier())
    model.compile(bandmf.BandMFOptimizer("sgd", epsilon=8.0, delta=1e-3, l2_norm_clip=1.0))
    texts = tf.data.Dataset.from_tensor_slices((TEXTS, LABELS))
    model.fit(texts, batch_size=4, verbose=0)
    assert model.optimizer.plan.num_examples == 16


def test_validation_split_of_texts():
    model = private(plan=runs.make_plan(num_examples=12, batch_size=4, num_steps=3, num_bands=1))
    model.fit(TEXTS, LABELS, validation_split=0.25, verbose=0)
    loss, _ = model.evaluate(TEXTS[12:], LABELS[12:], verbose=0)
    assert model.history.history["val_loss"][-1] == pytest.approx(loss, rel=1e-5)


def test_a_grain_dataset_validates():
    grain = pytest.importorskip("grain")
    rows = [(text, label) for text, label in zip(*LISTS, strict=True)]
    validation = grain.MapDataset.source(rows).map(lambda row: (row[0], np.int32(row[1]))).batch(4)
    model = private()
    weights_after(model, PLAN.batches(*LISTS), validation_data=validation)
    loss, _ = model.evaluate(*LISTS, verbose=0)
    assert model.history.history["val_loss"][-1] == pytest.approx(loss, rel=1e-5)


@pytest.mark.slow
def test_a_language_model_makes_its_targets():
    """Targets and weights of tokens come from the preprocessor."""
    model = private(hub.gpt2)
    lines = np.array(hub.LINES)
    model.fit(PLAN.batches(lines), epochs=1, validation_data=(lines,), verbose=0)
    found = model.evaluate(hub.LINES, verbose=0, return_dict=True)
    assert model.history.history["val_loss"][-1] == pytest.approx(found["loss"], rel=1e-5)
    assert model.history.history["val_loss"][-1] > 0
    assert model.generate("a b", max_length=6).startswith("a b")
    again = private(hub.gpt2)
    again.fit(hub.LINES, epochs=1, batch_size=4, verbose=0, validation_data=hub.LINES)
    np.testing.assert_array_equal(again.get_weights()[0], model.get_weights()[0])
    assert again.history.history["val_loss"] == model.history.history["val_loss"]


@pytest.mark.slow
def test_images_are_scaled_for_training_as_for_prediction():
    """Numbers are preprocessed, too: raw images would train another model than is evaluated."""
    images = np.random.default_rng(0).uniform(0, 255, (16, 8, 8, 3)).astype(np.float32)
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    ours, theirs = (private(hub.image_classifier, loss=loss) for _ in range(2))
    theirs_rows = PLAN.batches(images, LABELS, preprocess=theirs.preprocess_samples)
    found = weights_after(ours, PLAN.batches(images, LABELS), validation_data=(images, LABELS))
    np.testing.assert_array_equal(found, weights_after(theirs, theirs_rows))
    raw = private(hub.image_classifier, loss=loss)
    raw.preprocessor = None
    assert not np.array_equal(found, weights_after(raw, PLAN.batches(images, LABELS)))


def test_rows_that_were_preprocessed_stay_what_they_are(expected):
    model = private()
    tokens = model.preprocessor(list(TEXTS))
    found = weights_after(
        model, PLAN.batches(tokens, LABELS), epochs=2, validation_data=(tokens, LABELS)
    )
    np.testing.assert_array_equal(found, expected)


def test_the_preprocessor_gets_one_row_at_a_time():
    """By construction: a preprocessor that mixes the rows of a batch finds none to mix."""
    sizes = []

    def centered(texts):
        sizes.append(len(texts))
        tokens = preprocessor(texts)
        return tokens | {"segment_ids": tokens["segment_ids"] * len(texts)}

    model = private()
    preprocessor, model.preprocessor = model.preprocessor, centered
    batches = PLAN.batches(TEXTS, LABELS)
    task_data.preprocess_batches(batches, model)
    assert set(sizes) == {1} and len(sizes) >= 16


def test_a_run_of_raw_rows_goes_on():
    """The digest is that of the preprocessed rows, however they were given."""
    model = private()
    for data in (
        (PLAN.batches(TEXTS, LABELS),),
        (TEXTS, LABELS),
        (PLAN.batches(TEXTS, LABELS, preprocess=model.preprocess_samples),),
    ):
        model.fit(*data, epochs=1, steps_per_epoch=2, verbose=0)
    assert model.optimizer.steps_done == 6
    batches = PLAN.batches(TEXTS[::-1], LABELS)
    with pytest.raises(bandmf.PrivacyError, match="ows"):
        model.fit(batches, epochs=1, steps_per_epoch=2, verbose=0)


def test_a_preprocessor_that_is_random_is_refused():
    models = keras_hub.models
    preprocessor = models.BertMaskedLMPreprocessor(
        hub.tokenizer(), sequence_length=8, mask_selection_rate=0.5, mask_selection_length=4
    )
    backbone = models.BertBackbone(len(hub.WORDS), 1, 2, 8, 16, max_sequence_length=8)
    model = private(lambda: models.BertMaskedLM(backbone, preprocessor=preprocessor))
    long = np.array(["the good bad film was a"] * 16)
    with pytest.raises(ValueError, match="always in the same way.*augment"):
        model.fit(PLAN.batches(long), verbose=0)
    assert model.optimizer.steps_done == 0


@pytest.mark.parametrize(
    ("data", "match"),
    [
        (lambda: (PLAN.batches(np.ones(16), LABELS),), "does not take these rows.*preprocess="),
        (lambda: (np.ones(16), LABELS), "does not take these rows.*Received: float32"),
    ],
)
def test_rows_that_the_preprocessor_does_not_take(data, match):
    model = private()
    with pytest.raises(ValueError, match=match):
        model.fit(*data(), epochs=1, verbose=0)
    assert not model.optimizer.built


def test_data_in_an_order_of_the_user_is_preprocessed_by_the_user():
    plan = runs.make_plan(
        num_examples=16, batch_size=4, num_steps=8, sampling="fixed_order",
        max_participations=2, min_separation=4,
    )  # fmt: skip
    model = private(plan=plan)
    with pytest.raises(ValueError, match=r"preprocessed before `fit`.*model.preprocessor = None"):
        model.fit(TEXTS, LABELS, verbose=0)
    tokens = model.preprocessor(list(TEXTS))
    model.fit({name: np.array(rows) for name, rows in tokens.items()}, LABELS, verbose=0)
    assert model.optimizer.steps_done == 8


def test_strings_for_a_model_without_preprocessor():
    model = private(lambda: hub.classifier(preprocessor=None))
    with pytest.raises(TypeError, match="`x` to hold numbers.*of strings.*preprocess="):
        model.fit(PLAN.batches(TEXTS, LABELS), verbose=0)
    assert not model.optimizer.built


def test_replicas_share_the_raw_rows(expected):
    model = runs.in_scope(2, private)
    found = weights_after(
        model, PLAN.batches(TEXTS, LABELS), epochs=2, validation_data=(TEXTS, LABELS)
    )
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)
    assert np.isfinite(model.history.history["val_loss"]).all()
