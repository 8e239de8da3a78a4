"""The export of what may leave the trust boundary."""

from __future__ import annotations

import os
from typing import Any

import keras
import tensorflow as tf

from keras_bandmf._keras_internals import hub_preprocessing


def export(
    model: keras.Model, path: str | os.PathLike, *, raw_rows: Any = None, **options: Any
) -> None:
    """Writes the model, and nothing else, as a SavedModel for serving.

    Formal guarantees:
        The folder holds the weights and the forward function. The optimizer, with the run key,
        the noise key and the noise ring, is not part of it; `model.save`, `save_weights` and
        `tf.train.Checkpoint` do write them, and such files must stay secret.

    Args:
        model: A built model.
        path: The folder to write.
        raw_rows: For a task of keras_hub, what is served raw rows: `tf.TensorSpec([None],
            tf.string)` for texts. The SavedModel then holds the preprocessor, too. Whoever loads it
            to serve texts must `import tensorflow_text`. None serves what the preprocessor returns.
        **options: Passed on to `keras.Model.export`, for example `input_signature`.

    Raises:
        TypeError: If `model` is not a Keras 3 model, or `raw_rows` holds no `tf.TensorSpec`.
        ValueError: If the model has not been built, or has no preprocessor for `raw_rows`.

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
    if raw_rows is not None:
        _export_task(model, os.fspath(path), raw_rows, options)
        return
    options.setdefault("verbose", False)
    model.export(os.fspath(path), format="tf_saved_model", **options)


def _export_task(model: keras.Model, path: str, raw_rows: Any, options: dict[str, Any]) -> None:
    """Writes a task with its preprocessor, as a function of raw rows."""
    specs = keras.tree.flatten(raw_rows)
    if not specs or not all(isinstance(spec, tf.TensorSpec) for spec in specs):
        raise TypeError(
            "Expected `raw_rows` to be a `tf.TensorSpec`, or a structure of them. Received: "
            f"raw_rows={raw_rows!r}. For texts use `raw_rows=tf.TensorSpec([None], tf.string)`."
        )
    if options:
        raise TypeError(
            "Expected no further options with `raw_rows`. Received: "
            f"{', '.join(map(str, options))}. Leave them out."
        )
    preprocess = hub_preprocessing(model)
    if preprocess is None:
        raise ValueError(
            "`raw_rows` is for a task of keras_hub with a preprocessor. Received: the model "
            f"{model.name!r}, which has none. Leave it out."
        )

    def serve(rows: Any) -> Any:
        inputs, _, _ = keras.utils.unpack_x_y_sample_weight(preprocess(rows))
        return model(inputs)

    # Not the model itself: it refers to its optimizer.
    module = tf.Module()
    module.weights = [variable.value for variable in model.weights]
    module.preprocessor = model.preprocessor
    module.serve = tf.function(serve, input_signature=[raw_rows], autograph=False)
    tf.saved_model.save(module, path, signatures={"serving_default": module.serve})
