"""Every private name of Keras and TensorFlow does what the library takes it to do."""

import importlib
import runpy
import warnings

import keras
import numpy as np
import pytest
import tensorflow as tf
from tensorflow.python.distribute import collective_all_reduce_strategy

from keras_bandmf import _keras_internals
from keras_bandmf import _keras_internals as internals
from tests import runs


def small_model():
    """A subclassed model: Keras knows its shapes only when it builds it."""

    class Small(keras.Model):
        def __init__(self):
            super().__init__()
            self.dense = keras.layers.Dense(1)

        def call(self, x):
            return self.dense(x)

    model = Small()
    model.compile("sgd", "mse", metrics=["mae"])
    return model


@pytest.mark.parametrize("version", ["3.12.0", "3.15.1", "3.15.9", "2.99.0"])
def test_tested_versions_of_keras_are_taken_without_a_word(version):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        _keras_internals.warn_if_untested(version)


@pytest.mark.parametrize("version", ["3.16.0", "3.100.0.dev2026010103", "4.0.0"])
def test_a_newer_keras_is_reported(version):
    with pytest.warns(UserWarning, match=f"Received: Keras {version}"):
        _keras_internals.warn_if_untested(version)


def test_the_import_reports_a_newer_keras(monkeypatch):
    monkeypatch.setattr(keras, "__version__", "99.0.0")
    with pytest.warns(UserWarning, match="Received: Keras 99.0.0"):
        runpy.run_path(_keras_internals.__file__)


def test_multi_worker_mode():
    assert not _keras_internals.in_multi_worker_mode(runs.mirrored())
    # tests/training/test_workers.py runs it in several processes.
    extended = collective_all_reduce_strategy.CollectiveAllReduceExtended
    assert callable(extended._in_multi_worker_mode)


def test_programs_of_xla_are_told_from_others():
    found = {}

    def trace(name):
        found[name] = _keras_internals.inside_xla_program()
        return tf.zeros([])

    @tf.function(jit_compile=True)
    def outer():
        return tf.function(trace)("nested")

    outer()
    tf.function(trace, jit_compile=True)("compiled")
    tf.function(trace)("graph")
    trace("eager")
    assert found == {"nested": True, "compiled": True, "graph": False, "eager": False}


def test_build_model_builds_everything_and_runs_nothing():
    model = small_model()
    x, y = keras.KerasTensor((None, 3)), keras.KerasTensor((None, 1))
    _keras_internals.build_model(model, (x, y, None))
    assert model.built and model.optimizer.built
    assert model.dense.kernel.shape == (3, 1)
    assert int(model.optimizer.iterations) == 0
    assert {"loss", "mae"} <= set(model.get_metrics_result())


def test_fit_does_not_build_a_model_with_these_attributes():
    data = np.zeros((4, 3), np.float32), np.zeros((4, 1), np.float32)

    def refuse(*args, **kwargs):
        raise RuntimeError("built in fit")

    attributes = _keras_internals.attributes_without_build_in_fit()
    model = small_model()
    for name in attributes:
        setattr(model, name, refuse)
    with pytest.raises(RuntimeError, match="built in fit"):
        model.fit(*data, verbose=0)
    for name, value in attributes.items():
        setattr(model, name, value)
    model.fit(*data, verbose=0)


def test_variables_of_an_optimizer():
    optimizer = keras.optimizers.SGD(momentum=0.9)
    weights = [keras.Variable(np.zeros(2), name="a"), keras.Variable(np.zeros(3), name="b")]
    optimizer.build(weights)
    found = _keras_internals.optimized_variables(optimizer)
    assert [id(variable) for variable in found] == [id(variable) for variable in weights]
    own = _keras_internals.own_variables(optimizer)
    assert [id(variable) for variable in own] == [id(v) for v in optimizer.variables]
    assert len(own) >= 3  # the counter, and a momentum for each weight


def test_the_moments_of_adam():
    model = keras.Sequential([keras.Input((2,)), keras.layers.Dense(3)])
    optimizer = keras.optimizers.Adam(beta_1=0.5, beta_2=0.75)
    optimizer.build(model.trainable_variables)
    gradients = [tf.fill(variable.shape, 4.0 + i) for i, variable in enumerate(model.weights)]
    optimizer.apply(gradients, model.trainable_variables)
    for index, variable in enumerate(model.trainable_variables):
        first, second = internals.adam_moments(optimizer, variable.value)
        np.testing.assert_allclose(first.numpy(), gradients[index] * 0.5)
        np.testing.assert_allclose(second.numpy(), gradients[index] ** 2 * 0.25)


def test_checkpoints_call_the_hooks(tmp_path):
    class Counter(_keras_internals.CheckpointHooks, tf.Module):
        def __init__(self, count):
            super().__init__()
            self.count = count

        def _checkpoint_tensors(self):
            return {"count": tf.constant(self.count)}

        def _restore_checkpoint_tensors(self, tensors):
            self.count = int(tensors["count"])

    path = tf.train.Checkpoint(counter=Counter(7)).write(str(tmp_path / "checkpoint"))
    restored = Counter(0)
    tf.train.Checkpoint(counter=restored).read(path).assert_consumed()
    assert restored.count == 7


# Layers and models (used by clipping and rgp).


def nested():
    """A model in a model: (outer, inner, first, last)."""
    first, last = keras.layers.Dense(3, name="first"), keras.layers.Dense(2, name="last")
    inner = keras.Sequential([keras.Input((4,)), first, keras.layers.Dropout(0.5)])
    x = keras.Input((4,))
    return keras.Model(x, last(inner(x))), inner, first, last


def test_trained_layers_own_what_is_trained():
    model, _, first, last = nested()
    assert internals.trained_layers(model) == [first, last] or (
        internals.trained_layers(model) == [last, first]
    )
    first.trainable = False
    assert internals.trained_layers(model) == [last]


def test_all_layers_are_found_at_any_depth_and_once():
    model, inner, first, last = nested()
    found = internals.all_layers(model)
    assert {id(layer) for layer in found} >= {id(x) for x in (model, inner, first, last)}
    assert len({id(layer) for layer in found}) == len(found)
    without = internals.all_layers(model, include_self=False)
    assert all(layer is not model for layer in without)
    assert len(without) == len(found) - 1


def test_inner_layers_are_in_order_and_those_of_lists_too():
    class Stack(keras.layers.Layer):
        """Holds layers as attributes and in a list."""

        def __init__(self):
            super().__init__()
            self.first = keras.layers.Dense(1)
            self.rest = [keras.layers.Dense(2), keras.layers.Dense(3)]

    layer = Stack()
    assert internals.inner_layers(layer) == [layer.first, *layer.rest]
    assert not internals.inner_layers(layer.first)


def test_own_variables_are_those_a_layer_made_itself():
    model, _, first, _ = nested()
    assert internals.own_trainable_variables(first) == [first.kernel, first.bias]
    assert not internals.own_trainable_variables(model)
    first.trainable = False
    assert internals.own_trainable_variables(first) == [first.kernel, first.bias]
    norm = keras.layers.BatchNormalization()
    norm.build((None, 3))
    assert len(internals.own_weights(norm)) == 4
    assert not internals.own_weights(model)


def test_own_metrics_are_those_of_attributes():
    class Counting(keras.layers.Layer):
        """Has a metric."""

        def __init__(self):
            super().__init__()
            self.count = keras.metrics.Sum()

    layer = Counting()
    assert internals.own_metrics(layer) == [layer.count]
    assert not internals.own_metrics(keras.layers.Dense(1))


def test_own_seed_generators_are_those_of_attributes():
    dropout = keras.layers.Dropout(0.5)
    assert internals.own_seed_generators(dropout) == [dropout.seed_generator]
    assert not internals.own_seed_generators(keras.layers.Dense(1))


def test_the_global_seed_generator_is_what_no_seed_stands_for():
    generator = internals.global_seed_generator()
    assert internals.existing_global_seed_generator() is generator
    before = np.array(generator.state)
    keras.random.normal((2,))
    assert not np.array_equal(before, np.array(generator.state))


def test_a_global_seed_generator_that_was_not_made_is_none():
    keras.backend.clear_session()
    assert internals.existing_global_seed_generator() is None
    generator = internals.global_seed_generator()
    assert internals.existing_global_seed_generator() is generator


def test_added_losses_are_those_of_the_last_call():
    class Adding(keras.layers.Layer):
        """Adds a loss."""

        def call(self, x):
            self.add_loss(keras.ops.sum(x))
            return x

    layer = Adding()
    layer(tf.ones((2, 3)))
    assert [float(loss) for loss in internals.added_losses(layer)] == [6.0]
    dense = keras.layers.Dense(1, kernel_regularizer="l2")
    dense(tf.ones((2, 3)))
    assert not internals.added_losses(dense)  # a regularizer belongs to its weight


def test_who_takes_training():
    class Taking(keras.Model):
        """With the argument."""

        def call(self, x, training=False):
            return x

    class Other(keras.Model):
        """Without it."""

        def call(self, x):
            return x

    assert internals.takes_training(Taking())
    assert not internals.takes_training(Other())
    assert internals.takes_training(nested()[0])


def test_layers_that_recompute_their_activations():
    with keras.RematScope(mode="full"):
        inside = keras.layers.Dense(1)
    assert internals.recomputes_activations(inside)
    assert not internals.recomputes_activations(keras.layers.Dense(1))


def test_kernels_and_tables_are_variables_with_lora_too():
    dense, table = keras.layers.Dense(3), keras.layers.Embedding(5, 4)
    dense.build((None, 4))
    table.build()
    kernel, rows = internals.kernel_of(dense), internals.table_of(table)
    assert kernel is dense.kernel
    assert rows is table.embeddings
    dense.enable_lora(2)
    table.enable_lora(2)
    assert internals.kernel_of(dense) is kernel
    assert internals.table_of(table) is rows
    assert dense.kernel is not kernel


def test_attention_axes():
    assert internals.attention_axes_of(keras.layers.Dense(1)) is None
    layer = keras.layers.MultiHeadAttention(1, 2, attention_axes=(1, 2))
    assert tuple(internals.attention_axes_of(layer)) == (1, 2)


def test_the_parts_of_a_masked_language_head():
    keras_hub = pytest.importorskip("keras_hub")
    layer = keras_hub.layers.MaskedLMHead(vocabulary_size=5, activation="softmax")
    layer(tf.ones((2, 4, 3)), tf.zeros((2, 1), tf.int32))
    parts = internals.MaskedLMHeadParts(layer)
    assert isinstance(parts.dense, keras.layers.Dense)
    assert isinstance(parts.layer_norm, keras.layers.LayerNormalization)
    assert tuple(parts.bias.shape) == (5,)
    assert tuple(internals.kernel_of(layer).shape) == (3, 5)


def test_the_buckets_of_t5_are_those_its_attention_reads():
    pytest.importorskip("keras_hub")
    t5 = importlib.import_module("keras_hub.src.models.t5.t5_multi_head_attention")
    for is_decoder in (False, True):
        layer = t5.T5MultiHeadAttention(is_decoder, 4, 2, 2, 0.0, use_relative_attention_bias=True)
        buckets = internals.t5_bucket(layer, tf.range(-199, 150))
        by_distance = np.asarray(layer.relative_attention_bias)[buckets]
        found = np.asarray(layer.compute_bias(200, 150))[0]
        for query, key in ((0, 149), (199, 0), (3, 3), (20, 17), (60, 100)):
            expected = by_distance[key - query + 199]
            np.testing.assert_array_equal(found[:, query, key], expected)


def test_masks_are_those_that_layers_read_and_write():
    masked = keras.layers.Masking()(tf.constant([[[1.0], [0.0]]]))
    np.testing.assert_array_equal(internals.keras_mask(masked), [[True, False]])
    x = tf.ones((1, 2, 1))
    assert internals.keras_mask(x) is None
    internals.set_keras_mask(x, tf.constant([[True, False]]))
    pooled = keras.layers.GlobalAveragePooling1D()(x * 1.0)
    np.testing.assert_allclose(pooled, [[1.0]])
    kept = keras.layers.Dropout(0.0)(x)
    np.testing.assert_array_equal(internals.keras_mask(kept), [[True, False]])


def test_logits_are_what_losses_read():
    logits = tf.constant([[2.0, -1.0]])
    probabilities = keras.activations.softmax(logits)
    np.testing.assert_array_equal(internals.keras_logits(probabilities), logits)
    other = tf.constant([[0.5, 0.5]])
    assert internals.keras_logits(other) is None
    internals.set_keras_logits(other, logits)
    loss = keras.losses.SparseCategoricalCrossentropy()(tf.constant([0]), other)
    np.testing.assert_allclose(loss, -tf.nn.log_softmax(logits)[0, 0], rtol=1e-5)


def test_what_compile_made():
    model = nested()[0]
    assert internals.compiled_loss(model) is None
    assert internals.compiled_metrics(model) is None
    model.compile("sgd", "mse", metrics=["mae"])
    y, y_pred = tf.ones((2, 2)), tf.zeros((2, 2))
    loss = internals.compiled_loss(model)
    assert not loss.built
    np.testing.assert_allclose(loss(y, y_pred), 1.0)
    assert loss.built
    assert not internals.compiled_metrics(model).built
    np.testing.assert_allclose(internals.resolved_loss("mae")(y, 3.0 * y), 2.0)


def test_the_only_loss_and_its_function():
    y, y_pred = tf.ones((2, 2)), tf.zeros((2, 2))
    compiled = internals.resolved_loss("mse")
    loss = internals.only_loss(compiled, y, y_pred)
    assert compiled.built and isinstance(loss, keras.losses.Loss)
    assert internals.function_of_loss(loss) == (keras.losses.mean_squared_error, {})
    huber = keras.losses.Huber(delta=0.5)
    assert internals.function_of_loss(huber) == (keras.losses.huber, {"delta": 0.5})
    assert internals.function_of_loss(keras.losses.CTC())[0] is keras.losses.ctc
    for weighted in ({"loss": "mse", "loss_weights": 2.0}, {"loss": ["mse", "mae"]}):
        model = nested()[0]
        model.compile("sgd", **weighted)
        assert internals.only_loss(internals.compiled_loss(model), y, y_pred) is None

    class Own(keras.losses.MeanSquaredError):
        """Calls something else."""

        def __call__(self, y_true, y_pred, sample_weight=None):
            return tf.reduce_sum(y_pred)

    changed = keras.losses.MeanSquaredError()
    changed.call = lambda y_true, y_pred: y_pred
    assert internals.function_of_loss(Own()) is None
    assert internals.function_of_loss(changed) is None
    assert internals.function_of_loss(lambda y_true, y_pred: y_pred) is None


def test_the_loss_of_a_training_step_is_compute_loss():
    class Own(keras.Model):
        """Has a loss of its own."""

        def call(self, x):
            return x

        def compute_loss(self, x=None, y=None, y_pred=None, sample_weight=None, training=True):
            return keras.ops.sum(x) * (1.0 if training else 0.0) + keras.ops.sum(sample_weight)

    model = Own()
    model.compile("sgd")
    x = tf.ones((2, 1))
    assert float(internals.loss_of_training_step(model, x, x, x, x)) == 4.0


def test_the_loss_tracker_is_the_loss_of_the_logs():
    model = keras.Sequential([keras.Input((2,)), keras.layers.Dense(1)])
    model.compile("sgd", "mse")
    internals.loss_tracker(model).update_state(3.0)
    assert float(model.get_metrics_result()["loss"]) == 3.0


def test_symbolic_calls_build_and_run_nothing():
    """They see no values, and make the variables of layers and of losses."""
    seen = []

    class Sees(keras.layers.Layer):
        """Notes what it is called with."""

        def call(self, x):
            """Returns its inputs."""
            seen.append(tf.is_tensor(x) and hasattr(x, "numpy"))
            return x

    model = keras.Sequential([Sees(), keras.layers.Dense(3)])
    outputs = internals.traced_symbolically(model, tf.ones((5, 2)))
    assert model.built and tuple(outputs.shape) == (None, 3) and not any(seen)
    model.compile("sgd", ["mse"])
    loss = internals.compiled_loss(model)
    value = internals.traced_symbolically(loss, tf.ones((5, 3)), outputs)
    assert loss.built and tuple(value.shape) == ()
    assert np.isfinite(model(tf.ones((1, 2)))).all()


def test_the_graph_of_a_model():
    model, inner, first, last = nested()
    assert isinstance(model, internals.FunctionalModel)
    assert internals.graph_inside(model) is None
    graph = internals.graph_inside(inner)
    assert isinstance(graph, internals.FunctionalModel)
    nodes = internals.nodes_by_depth(model)
    order = [node.operation for depth in sorted(nodes, reverse=True) for node in nodes[depth]]
    assert order[1:] == [inner, last]
    operation, call = internals.call_that_made(model.outputs[0])
    assert operation is last
    assert [tuple(t.shape) for t in call.input_tensors] == [(None, 3)]
    assert first in graph.operations


def test_the_method_that_runs_a_graph():
    model = nested()[0]
    ran = []
    original = getattr(model, internals.RUN_GRAPH)

    def run(inputs, operation_fn=lambda operation: operation, call_fn=None):
        def counted(operation):
            ran.append(operation)
            return operation_fn(operation)

        return original(inputs, operation_fn=counted)

    vars(model)[internals.RUN_GRAPH] = run
    model(tf.ones((1, 4)))
    assert ran == model.operations[1:]
    for name in internals.METHODS_BEFORE_THE_GRAPH:
        assert hasattr(internals.FunctionalModel, name)


def test_operations_by_name():
    (add,) = internals.operation_classes("Add")
    x = keras.Input((2,))
    operation, _ = internals.call_that_made(x + x)
    assert type(operation) is add
    assert internals.operation_classes("NoSuchOperation") == []


def test_definitions_of_operations():
    assert internals.operation_definition("AssignVariableOp").is_stateful
    assert not internals.operation_definition("AddV2").is_stateful
    assert internals.operation_definition("NoSuchOperation") is None


def test_variables_that_a_graph_has_read():
    variable = tf.Variable(1.0, name="watched")
    found = []

    @tf.function
    def read():
        value = variable.read_value()
        found.extend(internals.watched_variables(tf.compat.v1.get_default_graph()))
        return value

    read()
    assert [v is variable for v in found] == [True]
    assert internals.watched_variables(tf.Graph()) == []


def test_a_stored_value_is_not_cast():
    layer = keras.layers.Dense(2, dtype="mixed_bfloat16")
    found = []

    class Looking(keras.layers.Layer):
        def call(self, x):
            found.append((_keras_internals.stored_value(layer.kernel), x))
            return x

    layer.build((None, 3))
    Looking(dtype="mixed_bfloat16")(np.ones((1, 3)))
    stored, x = found[0]
    assert stored.dtype == tf.float32 and x.dtype == tf.bfloat16
    np.testing.assert_array_equal(stored, layer.kernel.numpy())


def test_a_message_that_keras_leaves_alone():
    class Plain(Exception):
        pass

    @_keras_internals.keeps_its_message
    class Kept(Exception):
        pass

    class Failing(keras.layers.Layer):
        def __init__(self, error):
            super().__init__()
            self.error = error

        def call(self, x):
            raise self.error("short")

    for kind, same in ((Plain, False), (Kept, True)):
        with pytest.raises(kind) as caught:
            Failing(kind)(np.ones((1, 1)))
        assert (str(caught.value) == "short") is same


def test_what_a_task_of_keras_hub_does_to_rows():
    pytest.importorskip("keras_hub")
    from tests import hub

    task = hub.classifier()
    preprocess = internals.hub_preprocessing(task)
    x, y = preprocess(hub.TEXTS, hub.LABELS)
    assert set(x) == {"token_ids", "segment_ids", "padding_mask"} and len(y) == 16
    task.preprocessor = None
    assert internals.hub_preprocessing(task) is None
    assert internals.hub_preprocessing(keras.Sequential()) is None


def test_validation_data_as_keras_batches_it():
    x, y = np.ones((5, 3)), np.ones(5)
    found = internals.evaluated_dataset((x, y), 2, None)
    assert [batch[0].shape[0] for batch in found] == [2, 2, 1]
    assert found.element_spec[0].dtype == tf.float32
    with pytest.raises(ValueError, match="Unrecognized"):
        internals.evaluated_dataset("words", 2, None)
