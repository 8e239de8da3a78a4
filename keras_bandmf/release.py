"""What may leave the trust boundary."""

from __future__ import annotations

import os
from typing import Any

import keras


def export(model: keras.Model, path: str | os.PathLike, **options: Any) -> None:
    """Writes the model as a SavedModel for serving, and nothing else.

    Formal guarantees:
        The folder holds the weights and the forward function. The optimizer, with the run key,
        the noise key and the noise ring, is not part of it; `model.save`, `save_weights` and
        `tf.train.Checkpoint` do write them, and such files must stay secret.

    Args:
        model: a built model.
        path: the folder to write.
        **options: passed on to `keras.Model.export`, for example `input_signature`.

    Raises:
        TypeError: if `model` is not a Keras 3 model.
        ValueError: if the model has not been built.
    """
    if not isinstance(model, keras.Model):
        raise TypeError(
            "Argument `model` must be a keras.Model of Keras 3 (`import keras`, not `tf.keras`, "
            "which `import tensorflow_transform` makes Keras 2). Received: "
            f"{type(model).__module__}.{type(model).__name__}"
        )
    if not model.built:
        raise ValueError(
            "A model is exported after it was built: call it on data or train it first. "
            f"Received: the unbuilt model {model.name!r}"
        )
    options.setdefault("verbose", False)
    model.export(os.fspath(path), format="tf_saved_model", **options)
