"""enable_rgp, merge_rgp and the RGP layers: what changes, and what must not."""

import keras
import numpy as np
import pytest
import tensorflow as tf

import keras_bandmf as bandmf
from keras_bandmf.clipping.coordinates import coordinates_of
from tests import runs


def make_model():
    """Convolution, attention-like EinsumDense, Dense and a head of two."""
    return keras.Sequential(
        [
            keras.Input((6, 6, 3)),
            keras.layers.Conv2D(8, 3, strides=2, padding="same", name="conv"),
            keras.layers.Reshape((9, 8)),
            keras.layers.EinsumDense("abc,cde->abde", (9, 2, 3), bias_axes="de", name="heads"),
            keras.layers.Flatten(),
            keras.layers.Dense(5, activation="tanh", name="dense"),
            keras.layers.Dense(2, name="head"),
            keras.layers.Activation("softmax"),
        ]
    )


X = np.random.default_rng(0).normal(size=(5, 6, 6, 3)).astype(np.float32)


def carried(model):
    """Paths of the variables with carriers."""
    return [v.path.split("/")[-2] for v in model.variables if coordinates_of(v) is not None]


def test_outputs_files_and_exports_are_those_of_the_plain_model(tmp_path):
    model = make_model()
    before = model.predict(X, verbose=0)
    assert bandmf.enable_rgp(model, 2) is model
    assert carried(model) == ["conv", "heads", "dense"]
    np.testing.assert_array_equal(model.predict(X, verbose=0), before)
    model.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    assert [type(layer) for layer in loaded.layers] == [type(layer) for layer in model.layers]
    assert carried(loaded) == [] and len(loaded.weights) == len(model.weights) == 8
    np.testing.assert_array_equal(loaded.predict(X, verbose=0), before)
    bandmf.export(model, tmp_path / "served")
    served = tf.saved_model.load(tmp_path / "served")
    np.testing.assert_allclose(served.serve(X), before, atol=1e-6)


def test_merge_undoes_it_and_keeps_the_trained_weights():
    model = runs.compiled(
        bandmf.privatize(bandmf.enable_rgp(make_model(), 2)),
        runs.make_plan(num_bands=1),
        loss="sparse_categorical_crossentropy",
    )
    x = np.random.default_rng(1).normal(size=(96, 6, 6, 3)).astype(np.float32)
    model.fit(model.optimizer.plan.batches(x, np.arange(96) % 2), epochs=1, verbose=0)
    assert "low-rank" in bandmf.statement(model).mechanism
    weights = model.get_weights()
    bandmf.merge_rgp(model)
    assert carried(model) == []
    for a, b in zip(model.get_weights(), weights, strict=True):
        np.testing.assert_array_equal(a, b)
    with pytest.raises(ValueError, match="Expected a model with gradient carriers"):
        bandmf.merge_rgp(model)
    # The noise was made for the coordinates: the optimizer does not go on without them.
    with pytest.raises(ValueError, match="coordinates"):
        model.fit(model.optimizer.plan.batches(x, np.arange(96) % 2), epochs=1, verbose=0)


def test_layers_and_exclude_name_layers():
    model = bandmf.enable_rgp(make_model(), 2, layers=["dense", "head"])
    assert carried(model) == ["dense", "head"]
    model = make_model()
    bandmf.enable_rgp(model, 2, exclude=["conv", model.get_layer("heads")])
    assert carried(model) == ["dense"]


def test_small_and_frozen_kernels_stay_as_they_are():
    model = make_model()
    model.get_layer("conv").trainable = False
    assert carried(bandmf.enable_rgp(model, 6)) == ["heads"]


def rgp_model():
    """The RGP layers."""
    return keras.Sequential(
        [
            keras.Input((6,), dtype="int32"),
            bandmf.layers.RGPEmbedding(9, 6, rank=2, refresh_every=3),
            keras.layers.Reshape((6, 6, 1)),
            bandmf.layers.RGPConv2D(4, 3, rank=2, refresh_every=3),
            keras.layers.Reshape((16, 4)),
            bandmf.layers.RGPEinsumDense("abc,cd->abd", (16, 5), rank=3, refresh_every=3),
            keras.layers.Flatten(),
            bandmf.layers.RGPDense(4, rank=1, refresh_every=3, activation="tanh"),
            keras.layers.Dense(1),
        ]
    )


def test_rgp_layers_keep_their_rank_through_a_file(tmp_path):
    model = rgp_model()
    x = np.random.default_rng(0).integers(0, 9, (4, 6))
    model.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    np.testing.assert_array_equal(loaded.predict(x, verbose=0), model.predict(x, verbose=0))
    for m in (model, loaded):
        found = [coordinates_of(v) for v in m.variables]
        assert [c.rank for c in found if c is not None] == [2, 2, 3, 1]
        assert {c.refresh_every for c in found if c is not None} == {3}
    bandmf.merge_rgp(loaded)
    loaded.save(tmp_path / "merged.keras")
    merged = keras.saving.load_model(tmp_path / "merged.keras")
    assert carried(merged) == []
    np.testing.assert_array_equal(merged.predict(x, verbose=0), model.predict(x, verbose=0))


def test_a_trained_file_predicts_as_a_plain_model_and_does_not_train_on(tmp_path):
    """The file has no carriers: the weights are there, but the run cannot go on from it."""
    plan = runs.make_plan(num_bands=1)
    model = runs.compiled(
        bandmf.privatize(bandmf.enable_rgp(make_model(), 2)),
        plan,
        loss="sparse_categorical_crossentropy",
    )
    x, y = np.tile(X, (20, 1, 1, 1))[:96], np.arange(96) % 2
    model.fit(plan.batches(x, y), epochs=1, steps_per_epoch=2, verbose=0)
    model.save(tmp_path / "model.keras")
    plain = keras.saving.load_model(tmp_path / "model.keras", compile=False)
    np.testing.assert_array_equal(plain.predict(X, verbose=0), model.predict(X, verbose=0))
    with pytest.raises(ValueError, match="another run|could not be restored"):
        loaded = keras.saving.load_model(tmp_path / "model.keras")
        bandmf.privatize(loaded).fit(plan.batches(x, y), epochs=1, verbose=0)


@pytest.mark.parametrize("policy", ["float32", "mixed_bfloat16"])
def test_rgp_layers_take_the_book_keeping_path(policy):
    keras.config.set_dtype_policy(policy)
    try:
        model = rgp_model()
    finally:
        keras.config.set_dtype_policy("float32")
    plan = runs.make_plan(num_bands=1)
    runs.compiled(bandmf.privatize(model), plan)
    x = np.random.default_rng(0).integers(0, 9, (96, 6))
    model.fit(plan.batches(x, np.zeros(96, np.float32)), epochs=1, steps_per_epoch=1, verbose=0)
    assert bandmf.clipping.explain(model).route == "book-keeping"


def test_the_noise_is_as_wide_as_the_coordinates():
    """The ring of b - 1 rows holds r (m + n) numbers a kernel, not m n."""
    model = keras.Sequential([keras.Input((100,)), keras.layers.Dense(80, use_bias=False)])
    bandmf.enable_rgp(model, 2, layers=[model.layers[0]], refresh_every=4)
    strategy = bandmf.strategies.BlockDiagonalStrategy.optimize(24, 3, 4)
    plan = runs.make_plan(num_bands=None, strategy=strategy)
    optimizer = bandmf.BandMFOptimizer("sgd", plan)
    optimizer.build(model.trainable_variables)
    assert optimizer.run_state.noise.layout.size == 2 * (100 + 80)


def test_the_head_of_a_functional_model_and_of_a_subclassed_one():
    x = keras.Input((6,))
    hidden = keras.layers.Dense(5, name="hidden")(x)
    first = keras.layers.Dense(4, name="first")(hidden)
    second = keras.layers.Activation("tanh")(keras.layers.Dense(4, name="second")(hidden))
    assert carried(bandmf.enable_rgp(keras.Model(x, [first, second]), 2)) == ["hidden"]

    class Subclassed(keras.Model):
        """Two Dense layers; the order they were made in is all one can see."""

        def __init__(self):
            super().__init__()
            self.one, self.two = keras.layers.Dense(5, name="one"), keras.layers.Dense(4)

        def call(self, x):
            return self.two(self.one(x))

    model = Subclassed()
    model(np.zeros((1, 6), np.float32))
    assert carried(bandmf.enable_rgp(model, 2)) == ["one"]


def enabled_twice():
    """Carriers on carriers."""
    bandmf.enable_rgp(bandmf.enable_rgp(make_model(), 2), 2)


def after_compile():
    """Compiled first."""
    model = make_model()
    model.compile("sgd", "mse")
    bandmf.enable_rgp(model, 2)


def constrained():
    """A kernel that is moved after every update."""
    layer = keras.layers.Dense(4, kernel_constraint="non_neg")
    bandmf.enable_rgp(keras.Sequential([keras.Input((5,)), layer, keras.layers.Dense(4)]), 2)


MISUSES = {
    "rank_too_large": (lambda: bandmf.enable_rgp(make_model(), 6, layers=["dense"]), "rank=6"),
    "rank_zero": (lambda: bandmf.enable_rgp(make_model(), 0), "`rank`"),
    "unbuilt": (
        lambda: bandmf.enable_rgp(keras.Sequential([keras.layers.Dense(3)]), 2),
        "not built",
    ),
    "twice": (enabled_twice, "merge_rgp"),
    "after_compile": (after_compile, "before `compile`"),
    "constraint": (constrained, "constraint"),
    "all_excluded": (
        lambda: bandmf.enable_rgp(make_model(), 2, exclude=["conv", "heads", "dense"]),
        "at least one kernel",
    ),
    "rank_above_all": (lambda: bandmf.enable_rgp(make_model(), 500), "at least one kernel"),
    "unknown_layer": (lambda: bandmf.enable_rgp(make_model(), 2, exclude=["nose"]), "nose"),
    "layer_without_kernel": (
        lambda: bandmf.enable_rgp(make_model(), 2, layers=["reshape", "flatten"]),
        "`layers`",
    ),
    "grouped": (
        lambda: bandmf.enable_rgp(
            keras.Sequential(
                [keras.Input((5, 5, 4)), keras.layers.Conv2D(4, 3, groups=2, name="grouped")]
            ),
            2,
            layers=["grouped"],
        ),
        "grouped convolution",
    ),
    "thin_rank": (
        lambda: keras.Sequential([keras.Input((5,)), bandmf.layers.RGPDense(3, rank=4)]),
        "rank=4",
    ),
    "head_scale": (lambda: bandmf.enable_rgp(make_model(), 2, head_scale=0), "head_scale=0"),
    "scaled_head_with_carriers": (
        lambda: bandmf.enable_rgp(make_model(), 2, layers=["head"], head_scale=0.1),
        "without carriers",
    ),
    "no_carriers_yet": (
        lambda: bandmf.clipped_gradients(
            bandmf.enable_rgp(make_model(), 2), X, np.zeros((5, 2)), loss="mse"
        ),
        "Build the optimizer",
    ),
}


@pytest.mark.parametrize("name", MISUSES)
def test_misuse_is_refused_with_a_way_out(name):
    misuse, message = MISUSES[name]
    with pytest.raises(ValueError, match=message):
        misuse()


@pytest.mark.parametrize("rank", [True, 2.0, "2", None])
def test_a_rank_that_is_no_integer_is_refused(rank):
    with pytest.raises(TypeError, match="`rank`"):
        bandmf.enable_rgp(make_model(), rank)


@pytest.mark.parametrize("restart", [1, None, "previous"])
def test_restart_is_a_flag(restart):
    with pytest.raises(TypeError, match="`restart`"):
        bandmf.enable_rgp(make_model(), 2, restart=restart)


def test_a_block_stands_for_the_layers_within_it():
    """Norms, frozen and small kernels inside are passed over; the nested head is the last one."""
    block = keras.Sequential(
        [
            keras.Input((6,)),
            keras.layers.Dense(5, name="first"),
            keras.layers.LayerNormalization(),
            keras.layers.Dense(1, name="narrow"),
            keras.layers.Dense(5, name="last"),
        ],
        name="block",
    )
    assert carried(bandmf.enable_rgp(keras.Sequential([keras.Input((6,)), block]), 2)) == ["first"]
    bandmf.merge_rgp(block)
    model = keras.Sequential([keras.Input((6,)), block, keras.layers.Dense(6, name="top")])
    bandmf.enable_rgp(model, 2, layers=["block", "top"])
    assert carried(model) == ["first", "top"]
