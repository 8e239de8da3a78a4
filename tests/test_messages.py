"""What is wrong with a call is said in plain words: the argument, what was received, the way out.

The first part gives each argument of the public functions each wrong kind of value. The second
makes the mistakes that a user of Keras makes first.
"""

import inspect
import logging
import math
import re

import keras
import numpy as np
import pytest
import tensorflow as tf

import keras_bandmf as bandmf
from tests import runs

X, Y = np.ones((16, 3), np.float32), np.arange(16) % 2
PLAN = runs.make_plan(num_examples=16, batch_size=4, num_steps=8, num_bands=2)
LOSS = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
TARGET = {"num_examples": 100, "batch_size": 10, "epochs": 2, "delta": 1e-3, "num_bands": 1}


def net(*layers):
    return keras.Sequential([keras.Input((3,)), *layers, keras.layers.Dense(2)])


def ready(plan=PLAN, loss=LOSS, **options):
    model = bandmf.privatize(net())
    model.compile(bandmf.BandMFOptimizer("sgd", plan, l2_norm_clip=1.0), loss=loss, **options)
    return model


# ---- each argument with each wrong kind of value

WRONG = {
    "None": None,
    "a word": "word",
    "a negative number": -1,
    "NaN": math.nan,
    "infinity": math.inf,
    "a list": [1],
    "a bool": True,
    "a fraction": 2.5,
    "an object": object(),
    "a matrix": np.ones((2, 3)),
    "a dict": {"a": 1},
}
ANY = set(WRONG)

#: name: (function, good arguments, {argument: the wrong values that are good ones, after all}).
OPTIONAL = {"None"}
CALLS = {
    "TrainingPlan": (
        lambda: bandmf.TrainingPlan,
        TARGET | {"noise_multiplier": 1.0},
        {
            "noise_multiplier": {"a fraction"},
            "num_steps": OPTIONAL,
            "max_participations": OPTIONAL,
            "min_separation": OPTIONAL,
            "workload": OPTIONAL,
            "certificate": OPTIONAL,
            "unit": {"a word"},
        },
    ),
    "TrainingPlan.calibrate": (
        lambda: bandmf.TrainingPlan.calibrate,
        TARGET | {"epsilon": 4.0},
        {
            "epsilon": {"a fraction"},
            "num_steps": OPTIONAL,
            "max_participations": OPTIONAL,
            "min_separation": OPTIONAL,
            "workload": OPTIONAL,
            "callback": OPTIONAL,
            "cache_dir": {"None", "a word"},
            "unit": {"a word"},
        },
    ),
    "plan.epsilon": (lambda: PLAN.epsilon, {}, {"steps": OPTIONAL}),
    "plan.noise_stddev": (lambda: PLAN.noise_stddev, {}, {"l2_norm_clip": {"a fraction"}}),
    "plan.batches": (
        lambda: PLAN.batches,
        {"x": X, "y": Y},
        dict.fromkeys(
            ("y", "sample_weight", "class_weight", "preprocess", "seed", "unit", "augment"),
            OPTIONAL,
        )
        | {"decode": OPTIONAL, "workers": OPTIONAL},
    ),
    "BandMFOptimizer": (
        lambda: bandmf.BandMFOptimizer,
        {"optimizer": "sgd", "plan": PLAN},
        {
            "l2_norm_clip": {"a fraction"},
            "seed": OPTIONAL,
            "replay": {"a bool"},
            "name": ANY,
            "epsilon": OPTIONAL,
            "delta": OPTIONAL,
        },
    ),
    "privatize": (
        lambda: bandmf.privatize,
        {"model": net()},
        {"microbatch_size": OPTIONAL, "report_clipping": {"a bool"}, "history": OPTIONAL},
    ),
    "statement": (lambda: bandmf.statement, {"model": ready()}, {"delta": OPTIONAL}),
    "group_epsilon": (lambda: bandmf.group_epsilon, {"plan": PLAN, "group_size": 2}, {}),
    "max_bands_for_memory": (
        lambda: bandmf.max_bands_for_memory,
        {"num_parameters": 10, "memory_bytes": 10**6},
        {},
    ),
    "workload_from_optimizer": (
        lambda: bandmf.workload_from_optimizer,
        {"optimizer": keras.optimizers.SGD(0.1), "num_steps": 5},
        {"curvatures": {"a list"}, "curvature_weights": {"None", "a list"}},
    ),
    "merge_rgp": (lambda: bandmf.merge_rgp, {}, {}),
    "clipped_gradients": (
        lambda: bandmf.clipped_gradients,
        {"model": ready(), "x": X, "y": Y},
        {
            "sample_weight": OPTIONAL,
            "l2_norm_clip": {"a fraction"},
            "mask": OPTIONAL,
            "microbatch_size": OPTIONAL,
            "loss": OPTIONAL,
            "mask_seeds": OPTIONAL,
            "float64_sums": {"a bool"},
            "current_norm": OPTIONAL,
        },
    ),
    "CorrelatedNoise": (
        lambda: bandmf.noise.CorrelatedNoise,
        {"strategy": PLAN.strategy, "stddev": 1.0, "shapes": [(2,)]},
        {"stddev": {"a fraction"}, "seed": OPTIONAL, "exact": {"a bool"}},
    ),
    "PerLayerClipping": (
        lambda: bandmf.clipping.PerLayerClipping,
        {},
        {"shares": {"None", "a dict"}},
    ),
    "AutomaticClipping": (
        lambda: bandmf.clipping.AutomaticClipping,
        {},
        {"gamma": {"a fraction"}},
    ),
    "AdaptiveClipping": (
        lambda: bandmf.clipping.AdaptiveClipping,
        {},
        {"target_unclipped_quantile": {"a fraction"}, "learning_rate": {"a fraction"}},
    ),
    "StopAtEpsilon": (
        lambda: bandmf.callbacks.StopAtEpsilon,
        {},
        {"epsilon": {"a fraction"}},
    ),
    "sources.load": (lambda: bandmf.sources.load, {}, {"path": {"a word"}}),
    "audit_steps": (
        lambda: bandmf.audit.audit_steps,
        {"plan": PLAN, "trials": 100},
        {"distribution": OPTIONAL, "seed": OPTIONAL},
    ),
}


def arguments_of(name):
    function, _, _ = CALLS[name]
    kinds = (inspect.Parameter.VAR_KEYWORD, inspect.Parameter.VAR_POSITIONAL)
    found = inspect.signature(function()).parameters.items()
    return [argument for argument, parameter in found if parameter.kind not in kinds]


EACH = [(name, argument) for name in CALLS for argument in arguments_of(name)]


@pytest.mark.parametrize(("name", "argument"), EACH, ids=lambda value: value)
def test_wrong_arguments_are_named(name, argument):
    """No AttributeError, no KeyError, nothing of TensorFlow's, and no silence."""
    function, good, fine = CALLS[name]
    faults = []
    for kind in WRONG.keys() - fine.get(argument, set()):
        try:
            function()(**(good | {argument: WRONG[kind]}))
        except (TypeError, ValueError) as error:
            if argument not in str(error) or "Received" not in str(error):
                faults.append(f"{kind}: {type(error).__name__}: {error}")
        except Exception as error:
            faults.append(f"{kind}: {type(error).__name__}: {error}")
        else:
            faults.append(f"{kind}: no error")
    assert not faults, "\n".join(faults)


# ---- the mistakes that a user of Keras makes first


def compiled_without_privatize():
    model = net()
    model.compile(bandmf.BandMFOptimizer("sgd", PLAN), loss=LOSS)
    return model


def fit(*data, model=ready, **options):
    return lambda: model().fit(*data, verbose=0, **options)


def rows():
    return PLAN.batches(X, Y)


def dataset():
    return tf.data.Dataset.from_tensor_slices((X, Y))


class Stateful(keras.Model):
    def __init__(self):
        super().__init__()
        self.lstm = keras.layers.LSTM(2, stateful=True)

    def call(self, inputs):
        return self.lstm(inputs)


def stateful(model):
    model = bandmf.privatize(model)
    model.compile(bandmf.BandMFOptimizer("sgd", PLAN), loss="mse")
    return lambda: model.fit(PLAN.batches(np.ones((16, 4, 3)), np.ones((16, 2))), verbose=0)


def spectral():
    model = bandmf.privatize(net(keras.layers.SpectralNormalization(keras.layers.Dense(2))))
    model.compile(bandmf.BandMFOptimizer("sgd", PLAN), loss=LOSS)
    return model


MISTAKES = {
    "fit before compile": (fit(X, Y, model=lambda: bandmf.privatize(net())), "compiled first"),
    "statement before compile": (
        lambda: bandmf.statement(bandmf.privatize(net())),
        r"compiled first.*model\.compile",
    ),
    "compiled with another optimizer": (
        lambda: fit(X, Y, model=lambda: (m := ready(), m.compile("sgd", loss=LOSS))[0])(),
        "BandMFOptimizer",
    ),
    "batches without privatize": (
        lambda: compiled_without_privatize().fit(rows(), verbose=0),
        r"keras_bandmf\.privatize\(model\)` first",
    ),
    "arrays without privatize": (
        lambda: compiled_without_privatize().fit(X, Y, verbose=0),
        r"keras_bandmf\.privatize\(model\)` before `fit`",
    ),
    "statement without privatize": (
        lambda: bandmf.statement(net()),
        r"keras_bandmf\.privatize\(model\)` first",
    ),
    "batches in evaluate": (lambda: ready().evaluate(rows()), "`evaluate`, `predict` and"),
    "batches in predict": (lambda: ready().predict(rows()), "`evaluate`, `predict` and"),
    "batches in a clone": (
        lambda: (m := keras.models.clone_model(ready()), m.compile("sgd", "mse"), m.fit(rows())),
        "also after loading or cloning",
    ),
    "batches as validation data": (
        lambda: ready().fit(rows(), validation_data=rows()),
        "`validation_data` cannot be what `plan.batches` returns",
    ),
    "no loss": (lambda: fit(rows(), model=lambda: ready(loss=None))(), "loss=None.*loss=..."),
    "no targets": (lambda: fit(PLAN.batches(X))(), r"`y`.*y=None.*model\.fit\(x, y\)"),
    "no targets for rows": (fit(X), r"`y`.*y=None.*model\.fit\(x, y\)"),
    "more rows in a batch than there are": (
        fit(X, Y, model=lambda: of_target()),
        r"`batch_size`.*batch_size=32 \(the default",
    ),
    "another batch size": (fit(X, Y, batch_size=3), "`batch_size` must be the plan's 4"),
    "a dataset of batches": (lambda: fit(dataset().shuffle(8).batch(4))(), "unbatch"),
    "a repeated dataset": (lambda: fit(dataset().repeat())(), "no `repeat"),
    "too many steps an epoch": (
        lambda: fit(rows(), steps_per_epoch=100)(),
        "`steps_per_epoch` must be from 1 to the plan's 4",
    ),
    "steps that are no number": (lambda: fit(rows(), steps_per_epoch="all")(), "steps_per_epoch"),
    "true steps": (lambda: fit(rows(), steps_per_epoch=True)(), "steps_per_epoch=True"),
    "epochs that are no number": (lambda: fit(rows(), epochs="all")(), "`epochs`.*'all'"),
    "negative epochs": (lambda: fit(rows(), epochs=-1)(), "`epochs`.*-1"),
    "more epochs than planned": (fit(X, Y, epochs=9), r"`epochs` to fit.*Use `epochs=2`"),
    "a first epoch that is no number": (
        lambda: fit(rows(), initial_epoch=None)(),
        "`initial_epoch`.*None",
    ),
    "a validation split of batches": (
        lambda: fit(rows(), validation_split=0.5)(),
        "Split the data first",
    ),
    "the class of an optimizer": (
        lambda: bandmf.BandMFOptimizer(keras.optimizers.Adam, PLAN),
        r"not its class.*BandMFOptimizer\(keras.optimizers.Adam\(learning_rate=...\)",
    ),
    "a learning rate": (
        lambda: bandmf.BandMFOptimizer("adam", PLAN, learning_rate=0.1),
        r"Received: learning_rate=0.1. Use "
        r"`BandMFOptimizer\(keras.optimizers.Adam\(learning_rate=0.1\), plan\)`",
    ),
    "a learning rate alone": (
        lambda: bandmf.BandMFOptimizer(learning_rate=0.1),
        r"`optimizer`.*Received: learning_rate=0.1, no `optimizer`. Use `BandMFOptimizer\("
        r"keras.optimizers.SGD\(learning_rate=0.1\), epsilon=..., delta=...\)`",
    ),
    "a learning rate in the first place": (
        lambda: bandmf.BandMFOptimizer(0.1, epsilon=2.0, delta=1e-3),
        r"`BandMFOptimizer\(keras.optimizers.SGD\(learning_rate=0.1\), epsilon=",
    ),
    "a schedule and a beta": (
        lambda: bandmf.BandMFOptimizer(
            learning_rate=keras.optimizers.schedules.CosineDecay(0.1, 4), beta_1=0.5
        ),
        r"Received: learning_rate=CosineDecay, beta_1=0.5.*"
        r"Adam\(learning_rate=..., beta_1=0.5\)",
    ),
    "a config and momentum": (
        lambda: bandmf.BandMFOptimizer(
            {"class_name": "SGD", "config": {"learning_rate": 0.1}}, PLAN, momentum=0.9
        ),
        r"Received: momentum=0.9. Use `BandMFOptimizer\(keras.optimizers.SGD\(momentum=0.9",
    ),
    "no optimizer": (
        lambda: bandmf.BandMFOptimizer(epsilon=2.0, delta=1e-3),
        r"Received: no `optimizer`. Use .*SGD\(learning_rate=...\), epsilon=..., delta=...\)`",
    ),
    "weight decay and averages": (
        lambda: bandmf.BandMFOptimizer(
            keras.optimizers.SGD(0.1), PLAN, weight_decay=1e-3, use_ema=True, ema_momentum=0.9
        ),
        r"Received: weight_decay=0.001, use_ema=True, ema_momentum=0.9. Use `BandMFOptimizer\("
        r"keras.optimizers.SGD\(weight_decay=0.001, use_ema=True, ema_momentum=0.9, ...\), plan\)",
    ),
    "clipping as in Keras": (
        lambda: bandmf.BandMFOptimizer("sgd", PLAN, global_clipnorm=1.0),
        r"Received: global_clipnorm=1.0. Use `BandMFOptimizer\('sgd', plan, l2_norm_clip=...\)`",
    ),
    "the norm of a batch": (
        lambda: bandmf.BandMFOptimizer("sgd", PLAN, clipnorm=1.0),
        r"Received: clipnorm=1.0.*l2_norm_clip=...\)`. `clipnorm`: .*clipped per example",
    ),
    "accumulation": (
        lambda: bandmf.BandMFOptimizer("sgd", PLAN, gradient_accumulation_steps=2),
        r"gradient_accumulation_steps=2. Use `BandMFOptimizer\('sgd', plan\)`.*microbatch_size",
    ),
    "scaling of the loss": (
        lambda: bandmf.BandMFOptimizer("sgd", PLAN, loss_scale_factor=2.0),
        r"Received: loss_scale_factor=2.0.*mixed_bfloat16",
    ),
    "epsilon of zero": (
        lambda: bandmf.TrainingPlan.calibrate(**TARGET, epsilon=0),
        "`epsilon`.*above 0",
    ),
    "epsilon of zero in the optimizer": (
        lambda: bandmf.BandMFOptimizer("sgd", epsilon=0, delta=1e-3),
        "`epsilon`.*above 0",
    ),
    "no delta": (lambda: bandmf.BandMFOptimizer("sgd", epsilon=2.0), "delta=None"),
    "delta of one": (
        lambda: bandmf.TrainingPlan.calibrate(**(TARGET | {"delta": 1}), epsilon=2.0),
        "`delta`.*below 1",
    ),
    "single batches": (lambda: ready().train_on_batch(X, Y), r"train_on_batch.*model\.fit"),
    "the class of a callback": (
        lambda: fit(rows(), callbacks=[keras.callbacks.CSVLogger])(),
        "instances.*the class CSVLogger",
    ),
    "no callback at all": (lambda: fit(rows(), callbacks="log")(), "`callbacks`.*'log'"),
    "labels out of range": (fit(X, Y + 7), "before the first step.*label value of"),
    "a stateful layer": (
        lambda: stateful(keras.Sequential([keras.layers.LSTM(2, stateful=True)]))(),
        "Make it with `stateful=False`",
    ),
    "a stateful layer of one size": (
        lambda: stateful(
            keras.Sequential(
                [keras.Input((4, 3), batch_size=4), keras.layers.LSTM(2, stateful=True)]
            )
        )(),
        "Make it with `stateful=False`",
    ),
    "a stateful layer within": (lambda: stateful(Stateful())(), "Make it with `stateful=False`"),
    "spectral normalization": (fit(X, Y, model=spectral), "kernel_constraint="),
}


def of_target():
    model = bandmf.privatize(net())
    model.compile(bandmf.BandMFOptimizer("sgd", epsilon=8.0, delta=1e-3), loss=LOSS)
    return model


@pytest.mark.parametrize("mistake", MISTAKES)
def test_first_mistakes_are_told_with_the_way_out(mistake):
    make, match = MISTAKES[mistake]
    with pytest.raises((TypeError, ValueError)) as caught:
        make()
    words = str(caught.value).replace("\n", " ")
    assert re.search(match, words), words
    assert (
        "Received" in words or "Unrecognized data type: x=" in words or "plain gradients" in words
    )
    assert not isinstance(caught.value, tf.errors.OpError)


def test_more_epochs_than_the_plan_has_end_with_a_warning(caplog):
    model = ready()
    with caplog.at_level(logging.WARNING):
        history = model.fit(rows(), epochs=9, verbose=0)
    assert len(history.history["loss"]) == 2 and "Received: epochs=9" in caplog.text


def test_eager_runs_are_no_mistake():
    ready(run_eagerly=True).fit(rows(), epochs=1, verbose=0)


# ---- advice that was followed


@pytest.mark.parametrize("builds", [False, True])
def test_weights_of_another_optimizer_are_loaded_before_compile(tmp_path, builds):
    """The error says so at once, and what it says works."""
    path = str(tmp_path / "plain.weights.h5")
    plain = net()
    plain.compile("adam", loss=LOSS)
    plain.fit(X, Y, verbose=0)
    plain.save_weights(path)
    model = ready()
    if builds:
        model.optimizer.build(model.trainable_variables)
    with pytest.raises(ValueError, match=r"before `compile`: first `model\.load_weights\(path\)`"):
        model.load_weights(path)
    model = bandmf.privatize(net())
    model.load_weights(path)
    np.testing.assert_array_equal(model.get_weights()[0], plain.get_weights()[0])
    model.compile(bandmf.BandMFOptimizer("sgd", PLAN), loss=LOSS)
    model.fit(rows(), epochs=1, verbose=0)
    assert model.optimizer.steps_done == 4


def test_the_weights_of_a_run_are_loaded_after_building(tmp_path):
    path = str(tmp_path / "private.weights.h5")
    first = ready()
    first.fit(rows(), epochs=1, verbose=0)
    with pytest.warns(UserWarning):
        first.save_weights(path)
    model = ready()
    with pytest.raises(ValueError, match=r"optimizer\.build\(model\.trainable_variables\)` after"):
        model.load_weights(path)
    model = ready()
    model.optimizer.build(model.trainable_variables)
    model.load_weights(path)
    assert model.optimizer.steps_done == 4
    model.fit(rows(), epochs=1, verbose=0)
    assert model.optimizer.steps_done == 8


def test_a_constraint_in_place_of_spectral_normalization():
    class LargestSingularValue(keras.constraints.Constraint):
        def __call__(self, kernel):
            return kernel / keras.ops.norm(kernel, ord=2)

    dense = keras.layers.Dense(2, kernel_constraint=LargestSingularValue())
    model = bandmf.privatize(net(dense))
    model.compile(bandmf.BandMFOptimizer("sgd", PLAN), loss=LOSS)
    model.fit(rows(), epochs=1, verbose=0)
    assert np.linalg.norm(dense.kernel, 2) == pytest.approx(1.0, rel=1e-5)
