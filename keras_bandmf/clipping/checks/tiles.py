"""Refuses products in 16 bits where oneDNN may mix rows in them.

Measured with TensorFlow 2.21 (oneDNN 3.7) on a CPU with AMX. In bfloat16, but not where oneDNN
leaves AMX out:

 * in products of more than 16 rows, as in any Dense layer, a row that holds NaN or infinity makes
   the row before it NaN, if the inner dimension is over 32 and no multiple of it (oneDNN's issue
   5717). Five such products in a row, of which one example had become infinite, moved the sum of
   clipped gradients by 2.3 to 2.7 clip norms;
 * `tf.einsum("...y,xy->...x", a, b)`, which is also the gradient of `"...x,xy->...y"`, is wrong by
   its own size, with parts of other rows in it, if the dimension of `y` is odd, between 3 and 31.

In float16 this einsum is wrong and mixes rows for most dimensions, with AMX and without. Neither
was seen in float32, nor in programs of XLA.
"""

from __future__ import annotations

import functools
import os
import pathlib
import platform
import re
from collections.abc import Callable
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from keras_bandmf._checks import PrivacyError
from keras_bandmf._keras_internals import all_layers

# oneDNN's limit on the instructions it uses, and those of its values that leave AMX out and do not
# end the process: under AVX2, products in bfloat16 did.
_LIMITS = ("ONEDNN_MAX_CPU_ISA", "DNNL_MAX_CPU_ISA")
_WITHOUT_AMX = frozenset(
    ("AVX512_CORE", "AVX512_CORE_VNNI", "AVX512_CORE_BF16", "AVX512_CORE_FP16")
)
_X86 = ("x86_64", "amd64")
_CPU_FLAGS = pathlib.Path("/proc/cpuinfo")
_PRODUCTS = re.compile("MatMul|Einsum|Conv|Dot|RNN|LSTM|GRU")
_BFLOAT16, _FLOAT16 = tf.bfloat16.as_datatype_enum, tf.float16.as_datatype_enum


def refuse_narrow_layers(model: keras.Model) -> None:
    """Refuses a model with layers in bfloat16 if their products may run on tiles.

    Raises:
        PrivacyError: If it has one and they may.

    Formal guarantees: a necessary condition, read off the policies of the layers. What a layer, an
        operation or a loss casts by itself is found in graphs (`why_refused`).
    """
    narrow = [layer for layer in all_layers(model) if layer.compute_dtype == "bfloat16"]
    if narrow and may_use_tiles():
        where = f"layer '{narrow[0].path}' of type {type(narrow[0]).__name__} in bfloat16"
        raise PrivacyError(_because_of_tiles(where))


def why_refused(name: str, kind: str, node_def: Callable[[], Any]) -> str | None:
    """Returns why an operation must not be part of a private pass, or None.

    Args:
        name: Its name.
        kind: Its type, by the name of which products are told.
        node_def: A function that returns its `NodeDef`, which is called for products alone.
    """
    if not _PRODUCTS.search(kind):
        return None
    types = {value.type for value in node_def().attr.values()}
    where = f"operation '{name}' of type {kind}"
    if _FLOAT16 in types:
        return (
            "Products in float16 are refused: on some CPUs those of oneDNN are wrong and mix rows. "
            f"Compute them in float32; to keep numbers in float16 is fine. Received: {where}"
        )
    if _BFLOAT16 in types and may_use_tiles():
        return _because_of_tiles(f"{where} in bfloat16")
    return None


def _because_of_tiles(received: str) -> str:
    values = " and ".join(f"{name}={os.environ.get(name, '')!r}" for name in _LIMITS)
    late = "oneDNN had read it before it was set. " if _limited() else ""
    return (
        "On this CPU oneDNN may use AMX for products in bfloat16, which mixes rows: the gradient "
        f"of an example may hold what belongs to another. {late}Set {_LIMITS[0]}=AVX512_CORE_FP16 "
        "in the environment before Python starts, or compute in float32, for example by "
        f'keras.config.set_dtype_policy("float32"). Received: {received}, with {values}'
    )


def may_use_tiles() -> bool:
    """Returns whether products in bfloat16 may run on the tiles of a CPU.

    Formal guarantees: if it returns False, the CPU has no tiles as far as the operating system
        says, or oneDNN is told not to use them and shows neither of the two known faults.
    """
    return _has_tiles(_CPU_FLAGS) and (not _limited() or _shows_a_fault())


@functools.cache
def _has_tiles(flags: pathlib.Path) -> bool:
    if flags.exists():
        return "amx_" in flags.read_text(encoding="utf-8")
    return platform.system() != "Darwin" and platform.machine().lower() in _X86


def _limited() -> bool:
    """Returns whether the environment tells oneDNN, as of now, to leave AMX out."""
    limits = [os.environ[name].upper() for name in _LIMITS if name in os.environ]
    return bool(limits) and set(limits) <= _WITHOUT_AMX


@functools.cache  # oneDNN has read its limit by then
def _shows_a_fault() -> bool:
    """Returns whether one of the two faults shows, as it does if a limit was set too late."""
    rows = np.full((32, 33), np.nan, np.float32)
    rows[0] = 1
    numbers = np.arange(24, dtype=np.float32).reshape(2, 4, 3)
    kernel = np.arange(18, dtype=np.float32).reshape(6, 3)

    # In arguments, for grappler computes what is constant by other kernels.
    @tf.function(autograph=False)
    def products(
        rows: tf.Tensor, ones: tf.Tensor, numbers: tf.Tensor, kernel: tf.Tensor
    ) -> tuple[tf.Tensor, tf.Tensor]:
        mixed = tf.einsum("...y,xy->...x", numbers, kernel)
        return tf.cast((rows @ ones)[0], tf.float32), tf.cast(mixed, tf.float32)

    with tf.init_scope(), tf.device("CPU:0"):
        given = (rows, np.ones((33, 64)), numbers, kernel)
        try:
            first, found = products(*(tf.cast(array, tf.bfloat16) for array in given))
        except tf.errors.InvalidArgumentError:  # TensorFlow is told to stop at NaN: nothing is seen
            return True
        right = numbers @ kernel.T
        is_wrong = tf.reduce_any(tf.abs(found - right) > 0.1 * np.abs(right).max())
        return bool(is_wrong | tf.reduce_any(tf.math.is_nan(first)))
