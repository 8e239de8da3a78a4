"""Flags of XLA under which the noise, or what is clipped, would be another one."""

import keras
import numpy as np
import pytest

import keras_bandmf as bandmf
from keras_bandmf._environment import refuse_loose_arithmetic
from keras_bandmf.strategies import ToeplitzStrategy

STRATEGY = ToeplitzStrategy([1.0, 0.5], 8)


def gradients():
    model = keras.Sequential([keras.Input((2,)), keras.layers.Dense(1)])
    model.compile(loss="mse")
    return bandmf.clipped_gradients(model, np.ones((3, 2)), np.ones((3, 1)))


@pytest.mark.parametrize(
    "flag",
    [
        "--xla_cpu_enable_fast_math=true",
        "--xla_cpu_enable_fast_math",
        "--xla_cpu_enable_fast_math=1",
        "--xla_enable_fast_math=True",
        "-xla_cpu_enable_fast_math=true",
        "--xla_gpu_default_to_alg_dot_bf16_bf16_f32=true",
        "--xla_gpu_enable_bf16_3way_gemm=true",
    ],
)
def test_loose_arithmetic_is_refused(monkeypatch, flag):
    monkeypatch.setenv("XLA_FLAGS", f"--xla_dump_to=/tmp {flag} --xla_gpu_ftz=false")
    for call in (gradients, lambda: bandmf.noise.CorrelatedNoise(STRATEGY, 1.0, [(3,)])):
        with pytest.raises(ValueError, match=f"Received: {flag}$"):
            call()


@pytest.mark.parametrize(
    "flags",
    ["", " ", "--xla_cpu_enable_fast_math=false", "--xla_gpu_cuda_data_dir=/usr/local/cuda"],
)
def test_other_flags_are_left_alone(monkeypatch, flags):
    monkeypatch.setenv("XLA_FLAGS", flags)
    refuse_loose_arithmetic()


def test_a_file_of_flags_is_read(monkeypatch, tmp_path):
    """What does not begin with a dash is to XLA the name of a file."""
    path = tmp_path / "flags"
    monkeypatch.setenv("XLA_FLAGS", str(path))
    refuse_loose_arithmetic()
    path.write_text("--xla_dump_to=/tmp\n--xla_cpu_enable_fast_math=true\n")
    with pytest.raises(ValueError, match="fast_math"):
        refuse_loose_arithmetic()
