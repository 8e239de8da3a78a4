"""Settings of the process that make arithmetic too loose for noise and clipping."""

from __future__ import annotations

import os
import pathlib

from keras_bandmf._checks import PrivacyError

# Flags of XLA. Measured with TensorFlow 2.21: fast arithmetic on processors makes the noise 4 % too
# small, and if NaNs are not honored, one row that is not finite spoils all sums. The other flags
# round float32 products to bfloat16. That version does not know the last two, and the first of them
# changed nothing on an H100.
_LOOSE_FLAGS = (
    "xla_enable_fast_math",
    "xla_cpu_enable_fast_math",
    "xla_gpu_default_to_alg_dot_bf16_bf16_f32",
    "xla_gpu_enable_bf16_3way_gemm",
    "xla_gpu_enable_bf16_6way_gemm",
)


def refuse_loose_arithmetic() -> None:
    """Refuses flags of XLA that allow arithmetic other than that of IEEE 754.

    Formal guarantees:
        A necessary condition only. It knows some flags by name, and reads the environment, which
        must be the same now as when XLA read it.

    Raises:
        PrivacyError: If one of these flags is set.
    """
    for flag in _flags(os.environ.get("XLA_FLAGS", "")):
        name, _, value = flag.lstrip("-").partition("=")
        if name in _LOOSE_FLAGS and value.lower() not in ("false", "0"):
            raise PrivacyError(
                "Noise and clipping need the arithmetic of IEEE 754. With this flag XLA makes the "
                "noise too small, lets rows that are not finite into the sums, or rounds float32 "
                "products. Remove it from the environment variable XLA_FLAGS before TensorFlow is "
                f"imported. Received: {flag}"
            )


def _flags(value: str) -> list[str]:
    """Returns the flags as XLA reads them: from the value itself, or from the file it names."""
    value = value.strip()
    if value and not value.startswith("-"):
        try:
            value = pathlib.Path(value).read_text(encoding="utf-8")
        except OSError:
            return []
    return value.split()
