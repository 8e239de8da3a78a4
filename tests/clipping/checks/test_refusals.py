"""Products of float32 matrices that keep fewer digits are refused, whatever shortens them."""

import subprocess
import sys

import keras
import numpy as np
import pytest
import tensorflow as tf

import keras_bandmf
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
