"""The TFX pipeline for real: its weights, its statement, and what leaves it."""

import importlib.util
import json
import pathlib
import subprocess
import sys

import keras
import numpy as np
import pytest
import tensorflow as tf

import keras_bandmf as bandmf
from tests import runs

if importlib.util.find_spec("tfx") is None:
    pytest.skip("TFX is not installed: see examples/tfx_pipeline", allow_module_level=True)

EXAMPLE = pathlib.Path(__file__).parent.parent.parent / "examples" / "tfx_pipeline"
SEED, EPOCHS = 7, 2


def python(arguments, **options):
    """Runs Python in a process of its own: TFX switches `tf.keras` for a whole process."""
    command = [sys.executable, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, **options)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-6000:]
    return done.stdout


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory):
    """The output folder of a run, and what it printed."""
    output = tmp_path_factory.mktemp("pipeline")
    options = ["--output", output, "--epochs", EPOCHS, "--seed", SEED]
    printed = python([EXAMPLE / "pipeline.py", *options])
    return output, printed


def only(folder, pattern):
    (found,) = folder.glob(pattern)
    return found


def records(folder):
    """The serialized examples below a folder, in the order of the files."""
    files = sorted(str(path) for path in folder.glob("*.gz"))
    return list(tf.data.TFRecordDataset(files, "GZIP").as_numpy_iterator())


def transformed(output, split):
    """Features and labels that Transform wrote."""
    folder = only(output, f"artifacts/Transform/transformed_examples/*/Split-{split}")
    spec = {
        "features": tf.io.FixedLenFeature([30], tf.float32),
        "benign": tf.io.FixedLenFeature([1], tf.int64),
    }
    parsed = tf.io.parse_example(records(folder), spec)
    return parsed["features"].numpy(), parsed["benign"].numpy()


@pytest.fixture(scope="module")
def direct(pipeline):
    """The same plan, key and rows, trained without TFX."""
    output, _ = pipeline
    plan_json = only(output, "artifacts/Trainer/model_run/*") / "plan.json"
    plan = bandmf.TrainingPlan.from_json(plan_json.read_text())
    x, y = transformed(output, "train")
    keras.utils.set_random_seed(SEED)
    with runs.mirrored().scope():
        model = bandmf.privatize(
            keras.Sequential(
                [keras.Input((30,)), keras.layers.Dense(16, "relu"), keras.layers.Dense(1)]
            )
        )
        model.compile(
            bandmf.BandMFOptimizer(keras.optimizers.SGD(0.5), plan, seed=SEED),
            keras.losses.BinaryCrossentropy(from_logits=True),
        )
    model.fit(plan.batches(x, y), epochs=EPOCHS, verbose=0)
    return model


def pushed(output):
    return only(output, "served/*")


def test_the_trainer_makes_the_weights_of_direct_training(pipeline, direct):
    variables = tf.saved_model.load(str(pushed(pipeline[0])))._all_variables
    found = {variable.shape.as_list().__repr__(): variable.numpy() for variable in variables}
    expected = {list(w.shape).__repr__(): w.numpy() for w in direct.trainable_variables}
    for shape, weights in expected.items():
        np.testing.assert_array_equal(found[shape], weights)


def test_the_statement_lies_beside_the_model(pipeline, direct):
    output, printed = pipeline
    folder = only(output, "artifacts/Trainer/model_run/*")
    statement = bandmf.Statement.from_json((folder / "statement.json").read_text())
    plan = direct.optimizer.plan
    assert statement.plan_fingerprint == plan.fingerprint
    assert statement.steps_run == plan.num_steps == EPOCHS * plan.steps_per_epoch
    assert statement.epsilon == plan.epsilon() <= 4.0
    assert not statement.private and "fixed seed" in statement.not_private_reason
    epsilon = json.loads((folder / "epsilon.json").read_text())
    assert epsilon == {"epsilon": statement.epsilon, "delta": 1e-4, "private": False}
    text = (folder / "statement.txt").read_text()
    assert text == str(statement) and text in printed
    for uncovered in ("StatisticsGen", "SchemaGen", "Transform", "metrics"):
        assert f"- {uncovered}:" in printed


def test_the_pushed_folder_holds_neither_ring_nor_key(pipeline, direct, tmp_path):
    """Those of the same run made directly; the same scan finds them in saved weights."""
    content = runs.all_bytes(pushed(pipeline[0]))
    found = runs.secrets(direct)
    assert direct.optimizer.plan.num_bands > 1 and len(found) > 4
    assert not [secret for secret in found if secret in content]
    for name in (b"bandmf", b"BandMF", b"noise_ring", b"sampler_key", b"run_key"):
        assert name not in content
    with pytest.warns(UserWarning, match="secrets"):
        direct.save_weights(tmp_path / "secret.weights.h5")
    kept = (tmp_path / "secret.weights.h5").read_bytes()
    assert any(secret in kept for secret in found)


SERVE = '''
import sys

class Without:
    """A finder for which some packages are not installed."""

    def __init__(self, finder):
        self.finder = finder

    def find_spec(self, name, path=None, target=None):
        hidden = ("keras", "tf_keras", "keras_bandmf", "tensorflow_transform")
        if name.split(".")[0] not in hidden:
            return self.finder.find_spec(name, path, target)

sys.meta_path = [Without(finder) for finder in sys.meta_path]
try:
    import keras
    sys.exit("keras can be imported")
except ModuleNotFoundError:
    pass
import tensorflow as tf

served = tf.saved_model.load(sys.argv[1]).signatures["serving_default"]
examples = tf.constant([bytes.fromhex(line) for line in sys.stdin.read().split()])
answers = served(examples=examples)["probability"].numpy()
for module in ("keras", "tf_keras", "keras_bandmf"):
    if module in sys.modules:
        sys.exit(module + " was imported")
print("ANSWERS", answers.tolist())
'''


def test_the_pushed_model_answers_without_keras(pipeline, direct):
    """Raw examples as CsvExampleGen wrote them; Transform may have changed the order of rows."""
    output, _ = pipeline
    raw = records(only(output, "artifacts/CsvExampleGen/examples/*/Split-eval"))
    printed = python(["-c", SERVE, pushed(output)], input="\n".join(r.hex() for r in raw))
    (line,) = (each for each in printed.splitlines() if each.startswith("ANSWERS"))
    x, _ = transformed(output, "eval")
    expected = tf.sigmoid(direct(x))[:, 0]
    assert len(raw) == len(x) == 169
    np.testing.assert_allclose(
        np.sort(json.loads(line.removeprefix("ANSWERS"))), np.sort(expected), rtol=1e-4, atol=1e-6
    )


CASES = """
import json, pathlib, sys

example, output, scratch = map(pathlib.Path, sys.argv[1:])
sys.path.insert(0, str(example))
import trainer_module
import tensorflow as tf
from tfx.components.trainer.fn_args_utils import DataAccessor, FnArgs
from tfx.components.util import tfxio_utils
from tfx.types import artifact_utils, standard_artifacts
from tfx_bsl.public.tfxio import TensorFlowDatasetOptions
import keras_bandmf as bandmf
from keras_bandmf import tfx_input

(examples_folder,) = output.glob("artifacts/Transform/transformed_examples/*")
examples = standard_artifacts.Examples()
examples.uri = str(examples_folder)
examples.split_names = artifact_utils.encode_split_names(["train", "eval"])
(graph,) = output.glob("artifacts/Transform/transform_graph/*")
factory = tfxio_utils.get_tf_dataset_factory_from_artifact([examples], [])
accessor = DataAccessor(factory, None, None)

def plan(sampling="cyclic_poisson", num_examples=400, **declared):
    return bandmf.TrainingPlan(num_examples=num_examples, batch_size=50, num_steps=16, num_bands=4,
        noise_multiplier=1.0, delta=1e-4, sampling=sampling, **declared)

def train(config):
    trainer_module.run_fn(FnArgs(
        train_files=[str(examples_folder / "Split-train" / "*")],
        eval_files=[str(examples_folder / "Split-eval" / "*")],
        transform_graph_path=str(graph), data_accessor=accessor, custom_config=config,
        model_run_dir=str(scratch / "run"), serving_model_dir=str(scratch / "model")))

def stream(**options):
    schema = trainer_module.tft.TFTransformOutput(str(graph)).transformed_metadata.schema
    files = [str(examples_folder / "Split-train" / "*")]
    options = {**tfx_input.stream_options(plan(), "benign"), **options}
    return factory(files, TensorFlowDatasetOptions(**options), schema)

def other_version():
    config = tfx_input.plan_to_config(plan())
    return {tfx_input.PLAN_KEY: json.dumps(json.loads(config[tfx_input.PLAN_KEY]) | {"version": 9})}

fixed = plan("fixed_order")
cases = {
    "no plan": lambda: train({"seed": None}),
    "no config": lambda: train(None),
    "other version": lambda: train(other_version()),
    "other count": lambda: train(tfx_input.plan_to_config(plan(num_examples=401))),
    "other count, fixed order": lambda: train(
        tfx_input.plan_to_config(plan("fixed_order", num_examples=399))),
    "default options": lambda: tfx_input.private_batches(stream(num_epochs=None), plan()),
    "shuffled": lambda: tfx_input.streamed_batches(stream(shuffle=True), fixed),
    "cut short": lambda: tfx_input.streamed_batches(stream(drop_final_batch=True, batch_size=64),
        bandmf.TrainingPlan(num_examples=400, batch_size=64, num_steps=16, num_bands=4,
        noise_multiplier=1.0, delta=1e-4, sampling="fixed_order")),
    "tf.keras model": lambda: bandmf.privatize(tf.keras.Sequential([tf.keras.layers.Dense(1)])),
    "fixed order": lambda: train(tfx_input.plan_to_config(fixed)),
}
for name, case in cases.items():
    try:
        case()
        result = "accepted"
    except (TypeError, ValueError) as error:
        result = " ".join(str(error).split())
    print("CASE", json.dumps([name, result, (scratch / "run").exists()]))
"""


def test_bad_input_is_refused_before_training_and_a_fixed_order_trains(pipeline, tmp_path):
    """On TFXIO's own streams, through `run_fn`; the last case is good, and leaves a model."""
    printed = python(["-c", CASES, EXAMPLE, pipeline[0], tmp_path])
    lines = [line.removeprefix("CASE ") for line in printed.splitlines() if line[:5] == "CASE "]
    results = {name: (text, trained) for name, text, trained in map(json.loads, lines)}
    expected = {
        "no plan": "Expected a plan in `custom_config",
        "no config": "Expected `custom_config` to be the dict",
        "other version": "version=9",
        "other count": "num_examples=401",
        "other count, fixed order": "num_examples=399",
        "default options": "stream_options",
        "shuffled": "shuffle=False",
        "cut short": "drop_final_batch=False",
        "tf.keras model": "import keras",
        "fixed order": "accepted",
    }
    assert results.keys() == expected.keys()
    for name, message in expected.items():
        text, trained = results[name]
        assert message in text, (name, text)
        assert trained == (name == "fixed order")
    statement = bandmf.Statement.from_json((tmp_path / "run" / "statement.json").read_text())
    assert statement.private and statement.adjacency == "zero-out"
    assert "least 8 steps apart" in statement.sampling and (tmp_path / "model").exists()
