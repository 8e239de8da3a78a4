"""The export of what may leave the trust boundary."""

from __future__ import annotations

import os
from typing import Any

import keras


def export(model: keras.Model, path: str | os.PathLike, **options: Any) -> None:
    """Writes the model, and nothing else, as a SavedModel for serving.

    Formal guarantees:
        The folder holds the weights and the forward function. The optimizer, with the run key,
        the noise key and the noise ring, is not part of it; `model.save`, `save_weights` and
        `tf.train.Checkpoint` do write them, and such files must stay secret.

    Args:
        model: A built model.
        path: The folder to write.
        **options: Passed on to `keras.Model.export`, for example `input_signature`.

    Raises:
        TypeError: If `model` is not a Keras 3 model.
        ValueError: If the model has not been built.

    Example:
        >>> import pathlib, tempfile
        >>> import keras
        >>> import keras_bandmf as bandmf
        >>> model = keras.Sequential([keras.Input((3,)), keras.layers.Dense(1)])
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     path = pathlib.Path(folder) / "served"
        ...     bandmf.export(model, path)
        ...     (path / "saved_model.pb").exists()
        True
    """
    if not isinstance(model, keras.Model):
        raise TypeError(
            "Expected `model` to be a keras.Model of Keras 3. Use `import keras`, not `tf.keras`: "
            "`import tensorflow_transform` turns the latter into Keras 2. Received: model of type "
            f"{type(model).__module__}.{type(model).__name__}"
        )
    if not model.built:
        raise ValueError(
            "The model must be built before it can be exported. Call it on data or train it first. "
            f"Received: the unbuilt model {model.name!r}"
        )
    options.setdefault("verbose", False)
    model.export(os.fspath(path), format="tf_saved_model", **options)
