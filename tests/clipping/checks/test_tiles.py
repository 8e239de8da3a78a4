"""Products in 16 bits are refused where the tiles of a CPU may compute them, wherever they are."""

import os
import pathlib
import subprocess
import sys

import keras
import numpy as np
import pytest
import tensorflow as tf
from tensorflow.python.framework import function

import keras_bandmf as bandmf
from keras_bandmf.clipping.checks import captures, tiles
from keras_bandmf.clipping.checks.refusals import refuse_model

ROWS = 32
_FLAGS = pathlib.Path("/proc/cpuinfo")
WAY_OUT = "ONEDNN_MAX_CPU_ISA=AVX512_CORE_FP16"


@pytest.fixture
def tiled(monkeypatch, tmp_path):
    """Makes the CPU one that has tiles, with no limit on instructions."""
    flags = tmp_path / "cpuinfo"
    flags.write_text("flags : fpu avx512f avx512_bf16 amx_bf16 amx_tile\n")
    monkeypatch.setattr(tiles, "_CPU_FLAGS", flags)
    for name in ("ONEDNN_MAX_CPU_ISA", "DNNL_MAX_CPU_ISA"):
        monkeypatch.delenv(name, raising=False)


def _layer(dtype="mixed_bfloat16"):
    return keras.Sequential([keras.Input((4,)), keras.layers.Dense(2, dtype=dtype)])


def test_layers(monkeypatch, tiled):
    refuse_model(_layer("float32"))
    for limit in (None, "ALL", "AVX2", "AVX512_CORE_AMX"):
        if limit:
            monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", limit)
        with pytest.raises(bandmf.PrivacyError, match=WAY_OUT):
            refuse_model(_layer())
    for limit in ("AVX512_CORE", "AVX512_CORE_VNNI", "avx512_core_bf16", "AVX512_CORE_FP16"):
        monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", limit)
        refuse_model(_layer())
    monkeypatch.setenv("DNNL_MAX_CPU_ISA", "ALL")
    with pytest.raises(bandmf.PrivacyError, match="DNNL_MAX_CPU_ISA='ALL'"):
        refuse_model(_layer())


@pytest.mark.parametrize(
    "system, machine, refused",
    [
        ("Linux", "aarch64", False),
        ("Darwin", "x86_64", False),
        ("Windows", "AMD64", True),
        ("Linux", "x86_64", True),
    ],
)
def test_a_cpu_of_which_nothing_is_known(monkeypatch, tiled, tmp_path, system, machine, refused):
    monkeypatch.setattr(tiles, "_CPU_FLAGS", tmp_path / "none")
    monkeypatch.setattr(tiles.platform, "system", lambda: system)
    monkeypatch.setattr(tiles.platform, "machine", lambda: machine)
    assert tiles.may_use_tiles() is refused


def test_a_cpu_without_tiles(monkeypatch, tiled, tmp_path):
    flags = tmp_path / "other"
    flags.write_text("flags : fpu avx512f avx512_bf16\n")
    monkeypatch.setattr(tiles, "_CPU_FLAGS", flags)
    refuse_model(_layer())


def test_a_limit_that_came_too_late(monkeypatch, tiled):
    """oneDNN reads it once; what it does then is seen in products."""
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", "AVX512_CORE_FP16")
    monkeypatch.setattr(tiles, "_shows_a_fault", lambda: True)
    with pytest.raises(bandmf.PrivacyError, match="read it before it was set"):
        refuse_model(_layer())


@pytest.mark.skipif(
    not _FLAGS.exists() or "amx_bf16" not in _FLAGS.read_text(encoding="utf-8"),
    reason="a CPU without AMX",
)
@pytest.mark.parametrize("late", [False, True])
def test_what_one_dnn_does(late):
    """In a process of its own, for oneDNN reads the environment once."""
    code = (
        "import os, sys\n"
        "import tensorflow as tf\n"
        "from keras_bandmf.clipping.checks import tiles\n"
        "if sys.argv[1] == 'True': tf.ones((3, 3)) @ tf.ones((3, 3))\n"
        "os.environ['ONEDNN_MAX_CPU_ISA'] = 'AVX512_CORE_FP16'\n"
        "found = [tiles.may_use_tiles()]\n"
        "tf.function(lambda: found.append(tiles.may_use_tiles()))()\n"
        "sys.exit(10 + found[0] if found[0] == found[1] else 1)\n"
    )
    without = {name: value for name, value in os.environ.items() if "MAX_CPU_ISA" not in name}
    ran = subprocess.run([sys.executable, "-c", code, str(late)], env=without, check=False)
    assert ran.returncode == 10 + late


def _dense():
    return keras.Sequential([keras.Input((8,)), keras.layers.Dense(8)])


def _cast():
    inputs = keras.Input((8,))
    narrow = keras.ops.cast(keras.layers.Dense(8)(inputs), "bfloat16")
    narrow = keras.ops.matmul(narrow, keras.ops.ones((8, 8), "bfloat16"))
    return keras.Model(inputs, keras.ops.cast(narrow, "float32"))


def _reversed():
    inputs = keras.Input((8,), dtype="int32")
    table = keras.layers.ReversibleEmbedding(5, 8, reverse_dtype="bfloat16")
    hidden = keras.layers.Dense(8)(table(inputs))
    return keras.Model(inputs, keras.ops.cast(table(hidden, reverse=True), "float32")[..., 0])


class _Casts(keras.layers.Layer):
    def build(self, shape):
        self.kernel = self.add_weight(shape=(shape[-1], 8))

    def call(self, x):
        narrow = tf.einsum("...x,xy->...y", *(tf.cast(t, tf.bfloat16) for t in (x, self.kernel)))
        return tf.cast(narrow, tf.float32)


def _custom():
    return keras.Sequential([keras.Input((8,)), _Casts()])


def _narrow_loss(y, y_pred):
    narrow = tf.cast(y_pred, tf.bfloat16) @ tf.ones((8, 8), tf.bfloat16)
    return tf.reduce_mean(tf.square(tf.cast(narrow, tf.float32) - y), -1)


CASES = {
    "an operation": (_cast, "mse"),
    "an embedding in reverse": (_reversed, "mse"),
    "a layer of the user": (_custom, "mse"),
    "a loss": (_dense, _narrow_loss),
}


def _data(make):
    if make is _reversed:
        return np.zeros((ROWS, 8), "int32"), np.zeros((ROWS, 8), "float32")
    return np.ones((ROWS, 8), "float32"), np.zeros((ROWS, 8), "float32")


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("case", CASES)
def test_products_that_no_policy_tells(tiled, case, compiled):
    """They are found in the graph of the step, or of the trial of an eager one."""
    make, loss = CASES[case]
    model, (x, y) = make(), _data(make)

    def step(x, y):
        return bandmf.clipped_gradients(model, x, y, l2_norm_clip=1.0, loss=loss).sums

    if case == "a layer of the user" and not compiled:
        step(x, y)  # it runs one example at a time
        return
    with pytest.raises(ValueError, match=WAY_OUT):
        (tf.function(step) if compiled else step)(x, y)


@pytest.mark.parametrize("case", CASES)
def test_check_model(tiled, case):
    make, loss = CASES[case]
    with pytest.raises(ValueError, match=WAY_OUT):
        bandmf.clipping.check_model(make(), *_data(make), loss=loss)


@pytest.mark.parametrize("compiled", [False, True])
def test_a_loss_that_was_not_checked(tiled, compiled):
    model, (x, y) = _dense(), _data(_dense)
    bandmf.clipping.check_model(model, x, y, loss="mse")

    def step(x, y):
        return bandmf.clipped_gradients(model, x, y, l2_norm_clip=1.0, loss=_narrow_loss).sums

    with pytest.raises(ValueError, match=WAY_OUT):
        (tf.function(step) if compiled else step)(x, y)


@pytest.mark.parametrize("jit_compile", [False, True])
def test_fit(tiled, jit_compile):
    model, (x, y) = _cast(), _data(_cast)
    plan = bandmf.TrainingPlan.calibrate(
        num_examples=ROWS, batch_size=8, epochs=1, epsilon=4.0, delta=1e-3
    )
    optimizer = bandmf.BandMFOptimizer("sgd", plan, l2_norm_clip=1.0)
    bandmf.privatize(model).compile(optimizer, "mse", jit_compile=jit_compile)
    with pytest.raises(ValueError, match=WAY_OUT):
        model.fit(x, y, verbose=0)


@pytest.mark.parametrize("case", CASES)
def test_all_of_them_run_elsewhere(case):
    make, loss = CASES[case]
    found = bandmf.clipped_gradients(make(), *_data(make), l2_norm_clip=1.0, loss=loss)
    assert all(np.isfinite(total).all() for total in found.sums)


def test_a_metric_may_compute_in_16_bits(tiled):
    """What it returns reaches no gradient."""

    def metric(y, y_pred):
        narrow = tf.cast(y_pred, tf.bfloat16) @ tf.ones((8, 8), tf.bfloat16)
        return tf.reduce_mean(tf.cast(narrow, tf.float32) - y, -1)

    model, (x, y) = _dense(), _data(_dense)
    model.compile("sgd", "mse", metrics=[metric])
    model.evaluate(x, y, verbose=0)
    bandmf.clipping.check_model(model, x, y)


def _half(make):
    inputs = keras.Input((8,))
    narrow = keras.ops.cast(keras.layers.Dense(8)(inputs), "float16")
    return keras.Model(inputs, keras.ops.cast(make(narrow), "float32"))


@pytest.mark.parametrize("compiled", [False, True])
def test_float16_is_refused_on_each_cpu(compiled):
    ones = np.ones((8, 8), "float16")
    model = _half(lambda x: keras.ops.einsum("...y,xy->...x", x, ones))
    x, y = _data(_cast)

    def step(x, y):
        return bandmf.clipped_gradients(model, x, y, l2_norm_clip=1.0, loss="mse").sums

    with pytest.raises(ValueError, match="Products in float16 are refused"):
        (tf.function(step) if compiled else step)(x, y)
    with pytest.raises(ValueError, match="Products in float16 are refused"):
        bandmf.clipping.check_model(model, x, y, loss="mse")


def test_numbers_may_be_kept_in_float16():
    found = bandmf.clipped_gradients(
        _half(lambda x: x * 2), *_data(_cast), l2_norm_clip=1.0, loss="mse"
    )
    assert all(np.isfinite(total).all() for total in found.sums)


def test_where_tensorflow_stops_at_nan(monkeypatch, tiled):
    """A limit is not believed there, and float32 needs none."""
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", "AVX512_CORE_FP16")
    shown = tiles._shows_a_fault.__wrapped__
    tf.debugging.enable_check_numerics()
    try:
        assert shown()
        bandmf.clipped_gradients(_dense(), *_data(_dense), l2_norm_clip=1.0, loss="mse")
    finally:
        tf.debugging.disable_check_numerics()


def test_functions_that_are_types_of_operations():
    """As imported graphs have them: the walk looks into these, too."""

    @function.Defun(tf.float32)
    def product(x):
        return tf.cast(tf.cast(x, tf.float16) @ tf.ones((8, 8), tf.float16), tf.float32)

    with tf.Graph().as_default() as graph:
        product(tf.ones((4, 8)))
        with pytest.raises(bandmf.PrivacyError, match="float16"):
            captures.refuse_products(graph)
        watch = captures.Watch(_dense(), None)
        results = product(tf.ones((4, 8)))
        with pytest.raises(captures.Refused, match="float16"):
            watch.refuse(results)
