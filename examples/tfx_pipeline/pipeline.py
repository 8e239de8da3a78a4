"""A TFX pipeline whose Trainer is differentially private, from CSV to a pushed SavedModel.

    python pipeline.py --output /tmp/tfx_pipeline

Runs CsvExampleGen, StatisticsGen, SchemaGen, Transform, Trainer and Pusher by LocalDagRunner, on
scikit-learn's breast cancer data, and prints what epsilon covers and what it does not.
"""

from __future__ import annotations

import argparse
import csv
import os
import pathlib

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

import numpy as np
import tensorflow as tf
from sklearn.datasets import load_breast_cancer
from tfx import v1 as tfx

import keras_bandmf as bandmf
from keras_bandmf import tfx_input

MODULE = pathlib.Path(__file__).parent / "trainer_module.py"
LABEL = "benign"
# A public number: it is chosen here, not counted.
NUM_TRAIN = 400

NOT_COVERED = """\
Epsilon covers what training releases: the weights, also of every step. It does NOT cover
  - StatisticsGen: its statistics are exact numbers about the rows;
  - SchemaGen: domains and shapes are read from the statistics;
  - Transform: means and variances of `tft.scale_to_z_score` are exact, and are inside the pushed
    model's transform graph; with bounds known beforehand, scale by those instead;
  - metrics: losses and accuracies in the logs are computed without noise;
  - everything else in the pipeline's folders: CSV, tf.Examples, metadata store.
Keep those inside the trust boundary, or make them private by other means."""


def write_csv(folder: pathlib.Path) -> None:
    """Writes the data as a folder a split: `train` with `NUM_TRAIN` rows, `eval` with the rest."""
    data = load_breast_cancer()
    names = [name.replace(" ", "_") for name in data.feature_names]
    order = np.random.default_rng(0).permutation(len(data.target))
    for split, rows in (("train", order[:NUM_TRAIN]), ("eval", order[NUM_TRAIN:])):
        (folder / split).mkdir(parents=True, exist_ok=True)
        with open(folder / split / "data.csv", "w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow([*names, LABEL])
            writer.writerows([*data.data[row], data.target[row]] for row in rows)


def make_plan(sampling: str, epochs: int) -> bandmf.TrainingPlan:
    """The plan of the run: all of it is public, and known before the data is read."""
    return bandmf.TrainingPlan.calibrate(
        num_examples=NUM_TRAIN,
        batch_size=50,
        epochs=epochs,
        epsilon=4.0,
        delta=1e-4,
        sampling=sampling,
    )


def make_pipeline(
    output: pathlib.Path, plan: bandmf.TrainingPlan, seed: int | None
) -> tfx.dsl.Pipeline:
    """The components, with the plan in the Trainer's `custom_config`.

    Args:
        output: folder of data, artifacts, metadata and the pushed model.
        plan: the plan of the run.
        seed: for tests only: the run is then not private.
    """
    splits = [
        tfx.proto.Input.Split(name=name, pattern=f"{name}/*.csv") for name in ("train", "eval")
    ]
    examples = tfx.components.CsvExampleGen(
        input_base=str(output / "data"), input_config=tfx.proto.Input(splits=splits)
    )
    statistics = tfx.components.StatisticsGen(examples=examples.outputs["examples"])
    schema = tfx.components.SchemaGen(
        statistics=statistics.outputs["statistics"], infer_feature_shape=True
    )
    transform = tfx.components.Transform(
        examples=examples.outputs["examples"],
        schema=schema.outputs["schema"],
        module_file=str(MODULE),
    )
    trainer = tfx.components.Trainer(
        module_file=str(MODULE),
        examples=transform.outputs["transformed_examples"],
        transform_graph=transform.outputs["transform_graph"],
        schema=schema.outputs["schema"],
        train_args=tfx.proto.TrainArgs(num_steps=plan.num_steps),
        eval_args=tfx.proto.EvalArgs(),
        custom_config={**tfx_input.plan_to_config(plan), "seed": seed},
    )
    pusher = tfx.components.Pusher(
        model=trainer.outputs["model"],
        push_destination=tfx.proto.PushDestination(
            filesystem=tfx.proto.PushDestination.Filesystem(base_directory=str(output / "served"))
        ),
    )
    return tfx.dsl.Pipeline(
        pipeline_name="private_breast_cancer",
        pipeline_root=str(output / "artifacts"),
        components=[examples, statistics, schema, transform, trainer, pusher],
        metadata_connection_config=tfx.orchestration.metadata.sqlite_metadata_connection_config(
            str(output / "metadata.db")
        ),
    )


def latest(pattern: str, folder: pathlib.Path) -> pathlib.Path:
    """The newest of the numbered folders of a kind of artifact."""
    return max(folder.glob(pattern), key=lambda path: int(path.name))


def main() -> None:
    """Runs the pipeline and says what came out."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=pathlib.Path, default=pathlib.Path("tfx_output"))
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument(
        "--sampling", choices=["cyclic_poisson", "fixed_order"], default="cyclic_poisson"
    )
    parser.add_argument("--devices", type=int, default=2, help="logical CPUs, without a GPU")
    parser.add_argument("--seed", type=int, help="for tests only: not private")
    options = parser.parse_args()

    if not tf.config.list_physical_devices("GPU"):
        tf.config.set_logical_device_configuration(
            tf.config.list_physical_devices("CPU")[0],
            [tf.config.LogicalDeviceConfiguration()] * options.devices,
        )
    output = options.output.resolve()
    write_csv(output / "data")
    plan = make_plan(options.sampling, options.epochs)
    print(plan)
    tfx.orchestration.LocalDagRunner().run(make_pipeline(output, plan, options.seed))

    run = latest("Trainer/model_run/*", output / "artifacts")
    print((run / "statement.txt").read_text())
    print(NOT_COVERED)
    print(f"Statement and plan: {run}")
    print(f"Pushed model: {latest('*', output / 'served')}")


if __name__ == "__main__":
    main()
