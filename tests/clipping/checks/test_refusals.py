"""Products of float32 matrices that keep fewer digits are refused, whatever shortens them."""

import os
import pathlib
import subprocess
import sys

import keras
import numpy as np
import pytest
import tensorflow as tf

import keras_bandmf
from keras_bandmf.clipping.checks import refusals
from keras_bandmf.clipping.checks.refusals import refuse_model, refuse_short_products

PROGRAM = """
import numpy as np
import tensorflow as tf

options = {option!r}
if options:
    tf.config.optimizer.set_experimental_options(options)
rng = np.random.default_rng(0)
a, b = rng.standard_normal((2, 256, 256))
product = tf.function(tf.matmul)(tf.constant(a, tf.float32), tf.constant(b, tf.float32))
print("error", np.abs(product - a @ b).max() / np.abs(a @ b).max())
from keras_bandmf.clipping.checks.refusals import refuse_short_products
try:
    refuse_short_products()
except ValueError as error:
    print("refused", error)
"""


def gradients():
    model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(2)])
    data = np.ones((3, 4), "float32"), np.zeros((3, 2), "float32")
    return keras_bandmf.clipped_gradients(
        model, *data, loss=keras.losses.MeanSquaredError(), l2_norm_clip=1.0
    )


@pytest.mark.parametrize(
    "name", ["TF_SET_ONEDNN_FPMATH_MODE", "ONEDNN_DEFAULT_FPMATH_MODE", "DNNL_DEFAULT_FPMATH_MODE"]
)
def test_math_modes_of_onednn(monkeypatch, name):
    for mode in ("BF16", "ANY", "bf16", "TF32", "unknown"):
        monkeypatch.setenv(name, mode)
        with pytest.raises(ValueError, match=f"Received: {name}={mode}"):
            gradients()
    for mode in ("", "STRICT", "strict"):
        monkeypatch.setenv(name, mode)
        refuse_short_products()


@pytest.mark.parametrize("name", ["auto_mixed_precision", "auto_mixed_precision_onednn_bfloat16"])
def test_mixed_precision_of_grappler(name):
    before = tf.config.optimizer.get_experimental_options().get(name, False)
    try:
        tf.config.optimizer.set_experimental_options({name: True})
        with pytest.raises(ValueError, match=f"Received: {name}"):
            gradients()
    finally:
        tf.config.optimizer.set_experimental_options({name: before})
    refuse_short_products()
    assert np.isfinite(gradients().norms).all()


@pytest.mark.slow
@pytest.mark.parametrize("option", [{}, {"auto_mixed_precision_onednn_bfloat16": True}])
def test_what_loses_digits_here_is_refused(option):
    """Whatever this machine's TensorFlow does with the option: not refused means exact."""
    program = [sys.executable, "-c", PROGRAM.format(option=option)]
    printed = subprocess.run(program, capture_output=True, text=True, check=True).stdout
    error = float(printed.split("error ")[1].split()[0])
    assert "refused" in printed if option else "refused" not in printed
    if not option:
        assert error < 1e-5


@pytest.mark.parametrize("kind", [keras.layers.LSTM, keras.layers.GRU])
@pytest.mark.parametrize("wrapped", [False, True])
def test_recurrent_kernels_of_cudnn_in_bfloat16(monkeypatch, kind, wrapped):
    """They read memory that nothing wrote; they run where a GPU is visible."""

    def model(dtype, **options):
        layer = kind(3, dtype=dtype, **options)
        layer = keras.layers.Bidirectional(layer, dtype=dtype) if wrapped else layer
        return keras.Sequential([keras.Input((4, 2)), layer])

    monkeypatch.setattr(tf.config, "get_visible_devices", lambda kind: [])
    refuse_model(model("mixed_bfloat16"))
    gpu = tf.config.PhysicalDevice("/physical_device:GPU:0", "GPU")
    monkeypatch.setattr(tf.config, "get_visible_devices", lambda kind: [gpu])
    with pytest.raises(ValueError, match="use_cudnn=False"):
        refuse_model(model("mixed_bfloat16"))
    refuse_model(model("mixed_bfloat16", use_cudnn=False))
    refuse_model(model("float32"))


def _one_layer(dtype):
    return keras.Sequential([keras.Input((4,)), keras.layers.Dense(2, dtype=dtype)])


@pytest.fixture
def cpu_flags(monkeypatch, tmp_path):
    """The file of the CPU's flags, which a test may write, and no limit on instructions."""
    flags = tmp_path / "cpuinfo"
    flags.write_text("flags : fpu avx512f avx512_bf16 amx_bf16 amx_tile\n")
    monkeypatch.setattr(refusals, "_CPU_FLAGS", flags)
    for name in ("ONEDNN_MAX_CPU_ISA", "DNNL_MAX_CPU_ISA"):
        monkeypatch.delenv(name, raising=False)
    return flags


def test_bfloat16_on_the_tiles_of_a_cpu(monkeypatch, cpu_flags):
    """Products mix rows there, unless oneDNN leaves AMX out."""
    refuse_model(_one_layer("float32"))
    for limit in (None, "ALL", "AVX512_CORE_AMX"):
        if limit:
            monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", limit)
        with pytest.raises(ValueError, match="ONEDNN_MAX_CPU_ISA=AVX512_CORE_BF16"):
            refuse_model(_one_layer("mixed_bfloat16"))
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", "AVX512_CORE_BF16")
    refuse_model(_one_layer("mixed_bfloat16"))
    monkeypatch.setenv("DNNL_MAX_CPU_ISA", "ALL")
    with pytest.raises(ValueError, match="DNNL_MAX_CPU_ISA='ALL'"):
        refuse_model(_one_layer("mixed_bfloat16"))


def test_bfloat16_on_another_cpu(monkeypatch, cpu_flags):
    """It is fine on a CPU that has no tiles, and refused on one that may have them."""
    cpu_flags.write_text("flags : fpu avx512f avx512_bf16\n")
    refuse_model(_one_layer("mixed_bfloat16"))
    cpu_flags.unlink()
    monkeypatch.setattr(refusals.platform, "machine", lambda: "aarch64")
    refuse_model(_one_layer("mixed_bfloat16"))
    monkeypatch.setattr(refusals.platform, "machine", lambda: "AMD64")
    monkeypatch.setattr(refusals.platform, "system", lambda: "Darwin")
    refuse_model(_one_layer("mixed_bfloat16"))
    monkeypatch.setattr(refusals.platform, "system", lambda: "Windows")
    with pytest.raises(ValueError, match="CPU with AMX"):
        refuse_model(_one_layer("mixed_bfloat16"))


def test_a_limit_on_instructions_that_came_too_late(monkeypatch, cpu_flags):
    """oneDNN reads it at its first product; what it does then is seen in a product."""
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", "AVX512_CORE_BF16")
    monkeypatch.setattr(refusals, "_leaks_on_tiles", lambda: True)
    with pytest.raises(ValueError, match="ONEDNN_MAX_CPU_ISA='AVX512_CORE_BF16'"):
        refuse_model(_one_layer("mixed_bfloat16"))


_FLAGS = pathlib.Path("/proc/cpuinfo")


@pytest.mark.skipif(
    not _FLAGS.exists() or "amx_bf16" not in _FLAGS.read_text(encoding="utf-8"),
    reason="a CPU without AMX",
)
@pytest.mark.parametrize("late", [False, True])
def test_what_one_dnn_does_on_a_cpu_with_tiles(late):
    """In a process of its own, for oneDNN reads the environment once."""
    code = (
        "import os, sys\n"
        "import tensorflow as tf\n"
        "from keras_bandmf.clipping.checks import refusals\n"
        "if sys.argv[1] == 'True': tf.ones((3, 3)) @ tf.ones((3, 3))\n"
        "os.environ['ONEDNN_MAX_CPU_ISA'] = 'AVX512_CORE_BF16'\n"
        "sys.exit(10 + refusals._may_use_amx())\n"
    )
    without = {name: value for name, value in os.environ.items() if "MAX_CPU_ISA" not in name}
    ran = subprocess.run([sys.executable, "-c", code, str(late)], env=without, check=False)
    assert ran.returncode == 10 + late
