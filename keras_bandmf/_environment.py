"""Settings of the process under which arithmetic is not what noise and clipping rest on."""

from __future__ import annotations

import os
import pathlib

from keras_bandmf._checks import PrivacyError

# Flags of XLA. Measured with TensorFlow 2.21: fast arithmetic on processors makes the noise 4 % too
# small, and without honored NaNs one row that is not finite spoils all sums. The other flags are
# there to round float32 products to bfloat16; that version does not know the last two, and the
# first of them changed nothing on an H100.
_LOOSE_FLAGS = (
    "xla_enable_fast_math",
    "xla_cpu_enable_fast_math",
    "xla_gpu_default_to_alg_dot_bf16_bf16_f32",
    "xla_gpu_enable_bf16_3way_gemm",
    "xla_gpu_enable_bf16_6way_gemm",
)


def refuse_loose_arithmetic() -> None:
    """Raise ValueError where XLA's flags allow arithmetic that is not that of IEEE 754.

    Formal guarantees: a necessary condition only. It knows some flags by name, and reads the
    environment, which must be now what it was when XLA read it.
    """
    for flag in _flags(os.environ.get("XLA_FLAGS", "")):
        name, _, value = flag.lstrip("-").partition("=")
        if name in _LOOSE_FLAGS and value.lower() not in ("false", "0"):
            raise PrivacyError(
                "Noise and clipping need the arithmetic of IEEE 754: with this flag XLA makes the "
                "noise too small, lets rows that are not finite into the sums, or rounds float32 "
                "products. Remove it from the environment variable XLA_FLAGS before TensorFlow is "
                f"imported. Received: {flag}"
            )


def _flags(value: str) -> list[str]:
    """What XLA reads: the flags themselves, or the file that has them."""
    value = value.strip()
    if value and not value.startswith("-"):
        try:
            value = pathlib.Path(value).read_text(encoding="utf-8")
        except OSError:
            return []
    return value.split()
