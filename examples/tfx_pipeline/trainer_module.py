"""User code of the pipeline: `preprocessing_fn` of Transform and `run_fn` of the Trainer.

Layers and models come from `import keras` (Keras 3). `import tensorflow_transform` turns `tf.keras`
into Keras 2, whose models `privatize` refuses.
"""

from __future__ import annotations

import json
import os
from typing import Any

import keras
import tensorflow as tf
import tensorflow_transform as tft
from tfx.components.trainer.fn_args_utils import FnArgs
from tfx_bsl.public.tfxio import TensorFlowDatasetOptions

import keras_bandmf as bandmf
from keras_bandmf import tfx_input

LABEL = "benign"
FEATURES = "features"


def preprocessing_fn(inputs: dict[str, tf.Tensor]) -> dict[str, tf.Tensor]:
    """Scales each feature by the mean and variance of the training split.

    These analyzers read the data without noise: the epsilon of training does not cover them.
    """
    names = sorted(name for name in inputs if name != LABEL)
    scaled = [tft.scale_to_z_score(tf.cast(inputs[name], tf.float32)) for name in names]
    return {FEATURES: tf.concat(scaled, axis=1), LABEL: tf.cast(inputs[LABEL], tf.int64)}


def build_model() -> keras.Model:
    """A small network on the transformed features; its output is a logit."""
    return keras.Sequential(
        [keras.Input((30,)), keras.layers.Dense(16, "relu"), keras.layers.Dense(1)]
    )


def compile_model(plan: bandmf.TrainingPlan, seed: int | None) -> keras.Model:
    """The private model; call it in the scope of the strategy.

    Args:
        plan: the plan of the run.
        seed: for tests only: the statement then says "not private".
    """
    if seed is not None:
        keras.utils.set_random_seed(seed)
    model = bandmf.privatize(build_model())
    model.compile(
        optimizer=bandmf.BandMFOptimizer(
            keras.optimizers.SGD(0.5), plan, l2_norm_clip=1.0, seed=seed
        ),
        loss=keras.losses.BinaryCrossentropy(from_logits=True),
        metrics=[keras.metrics.BinaryAccuracy(name="accuracy", threshold=0.0)],
    )
    return model


def run_fn(fn_args: FnArgs) -> None:
    """Trains privately, writes the statement to `model_run_dir`, and exports for serving."""
    config = fn_args.custom_config
    plan = tfx_input.plan_from_config(config)
    transform = tft.TFTransformOutput(fn_args.transform_graph_path)

    def stream(files: list[str]) -> tf.data.Dataset:
        options = TensorFlowDatasetOptions(**tfx_input.stream_options(plan, LABEL))
        schema = transform.transformed_metadata.schema
        dataset = fn_args.data_accessor.tf_dataset_factory(files, options, schema)
        return dataset.map(lambda features, label: (features[FEATURES], label))

    # Poisson sampling needs rows by number: the stream is read into memory. In a fixed order it
    # may stay on disk; the order of every epoch is then compared with that of the first.
    make_batches = (
        tfx_input.streamed_batches if plan.sampling == "fixed_order" else tfx_input.private_batches
    )
    batches = make_batches(stream(fn_args.train_files), plan)

    devices = tf.config.list_logical_devices("GPU") or tf.config.list_logical_devices("CPU")
    strategy = tf.distribute.MirroredStrategy([device.name for device in devices])
    with strategy.scope():
        model = compile_model(plan, config.get("seed"))
    model.fit(
        batches,
        epochs=-(-plan.num_steps // plan.steps_per_epoch),
        validation_data=stream(fn_args.eval_files),
        verbose=2,
    )
    statement = bandmf.statement(model)
    write(fn_args.model_run_dir, "statement.txt", str(statement))
    write(fn_args.model_run_dir, "statement.json", statement.to_json())
    write(fn_args.model_run_dir, "plan.json", plan.to_json())
    epsilon = {"epsilon": statement.epsilon, "delta": statement.delta, "private": statement.private}
    write(fn_args.model_run_dir, "epsilon.json", json.dumps(epsilon))
    export(model, transform, fn_args.serving_model_dir)


def write(folder: str, name: str, text: str) -> None:
    """Writes a text file to a folder of any file system TensorFlow knows."""
    tf.io.gfile.makedirs(folder)
    with tf.io.gfile.GFile(os.path.join(folder, name), "w") as file:
        file.write(text)


def export(model: keras.Model, transform: Any, path: str) -> None:
    """Writes a SavedModel: serialized `tf.Example` in, probability out, transform graph inside.

    Only variables that the endpoint reads are written: not the optimizer with run key and noise.
    `tf.saved_model.save(model, ...)`, as in other TFX examples, would write them; it is refused.
    """
    layer = transform.transform_features_layer()
    spec = transform.raw_feature_spec()
    del spec[LABEL]

    def serve(examples: tf.Tensor) -> dict[str, tf.Tensor]:
        features = layer(tf.io.parse_example(examples, spec))[FEATURES]
        return {"probability": tf.sigmoid(model(features))[:, 0]}

    archive = keras.export.ExportArchive()
    archive.track(model)
    archive.track(layer)
    signature = [tf.TensorSpec([None], tf.string, name="examples")]
    archive.add_endpoint("serving_default", serve, signature)
    archive.write_out(path, verbose=False)
