"""keras_hub's layers and models: every layer on the book-keeping path, found by name alone."""

import importlib
import pathlib
import re

import keras
import numpy as np
import pytest

from keras_bandmf import clipping
from keras_bandmf.clipping.rules import hub
from keras_bandmf.clipping.rules.registry import rule_of
from tests.clipping import reference

keras_hub = pytest.importorskip("keras_hub")

ROWS = 4
RNG = np.random.default_rng(0)
NORMS = [name for name in hub._RULES if "orm" in name.split(".")[-1]]


def found(name):
    module, _, attribute = name.rpartition(".")
    return getattr(importlib.import_module(module), attribute)


def randomised(layer, *args, **kwargs):
    layer(*args, **kwargs)
    for v in layer.trainable_variables:
        v.assign(RNG.normal(size=v.shape))
    return layer


def floats(*shape):
    return RNG.normal(size=(ROWS, *shape)).astype("float32")


def integers(low, high, *shape):
    return RNG.integers(low, high, size=(ROWS, *shape)).astype("int32")


@pytest.mark.parametrize("name", hub._RULES)
def test_every_name_is_that_of_a_layer(name):
    assert issubclass(found(name), keras.layers.Layer)


@pytest.mark.parametrize("name", NORMS)
def test_normalisations(name):
    x = floats(3, 6)
    assert clipping.check_rule(randomised(found(name)(), x), x) < 1e-5


@pytest.mark.parametrize("name", NORMS[:2])
def test_normalisations_in_bfloat16(name, bfloat16):
    x = floats(3, 6)
    assert clipping.check_rule(randomised(found(name)(), x), x) < 5e-2


def test_position_embedding():
    x = floats(5, 3)
    layer = keras_hub.layers.PositionEmbedding(8)
    assert clipping.check_rule(randomised(layer, x), x) < 1e-6
    deep = floats(2, 5, 3)
    layer = keras_hub.layers.PositionEmbedding(8)
    assert clipping.check_rule(randomised(layer, deep), deep) < 1e-6
    layer = keras_hub.layers.PositionEmbedding(8)
    places = integers(-8, 8, 5)
    error = clipping.check_rule(randomised(layer, x, positions=places), x, positions=places)
    assert error < 1e-6
    with pytest.raises(ValueError, match="start_index"):
        clipping.check_rule(layer, x, start_index=2)
    with pytest.raises(ValueError, match="example axis"):
        clipping.check_rule(layer, x, positions=np.arange(5))


class SharedPositions(keras.layers.Layer):
    def __init__(self):
        super().__init__()
        self.table = keras_hub.layers.PositionEmbedding(8)

    def call(self, inputs):
        return self.table(inputs, positions=np.array([[0, 1, 1, 2, -1]]))


def test_one_row_of_positions_for_every_example():
    x = floats(5, 3)
    assert clipping.check_rule(randomised(SharedPositions(), x), x) < 1e-6


def test_token_and_position_embedding():
    layer = keras_hub.layers.TokenAndPositionEmbedding(9, 6, 4)
    x = integers(0, 9, 5)
    assert clipping.check_rule(randomised(layer, x), x) < 1e-6


@pytest.mark.parametrize("tied", [False, True])
def test_masked_lm_head(tied):
    hidden, places = floats(5, 4), integers(0, 5, 2)
    table = keras_hub.layers.ReversibleEmbedding(7, 4)
    table.build()
    head = keras_hub.layers.MaskedLMHead(
        **({"token_embedding": table} if tied else {"vocabulary_size": 7}), activation="softmax"
    )
    assert clipping.check_rule(randomised(head, hidden, places), hidden, places) < 1e-5


@pytest.mark.parametrize("use_class_token", [True, False])
def test_vit_patches(use_class_token):
    layer_class = found("keras_hub.src.models.vit.vit_layers.ViTPatchingAndEmbedding")
    layer = layer_class((8, 4), (4, 2), 6, use_class_token=use_class_token)
    x = floats(8, 4, 3)
    assert clipping.check_rule(randomised(layer, x), x) < 1e-5
    layer.position_embedding.enable_lora(2)
    assert "LoRA" in rule_of(layer)[1]


class T5Attention(keras.layers.Layer):
    """Attention alone: without a mask, the biases are returned once for the whole batch."""

    def __init__(self, **options):
        super().__init__()
        kind = found("keras_hub.src.models.t5.t5_multi_head_attention.T5MultiHeadAttention")
        self.inside = kind(hidden_dim=6, key_value_dim=3, num_heads=2, dropout=0.0, **options)

    def call(self, x, mask=None, key_value_states=None, position_bias=None, cache=None):
        options = {} if cache is None else {"cache": cache, "cache_update_index": 0}
        options |= {"key_value_states": key_value_states, "position_bias": position_bias}
        return self.inside(x, mask=mask, **options)[0]


@pytest.mark.parametrize("is_decoder", [False, True])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("keys", [None, 3, 150])
def test_biases_of_t5_attention(is_decoder, masked, keys, float64):
    """Sequences so long that the last buckets, of many distances each, are used."""
    layer = T5Attention(is_decoder=is_decoder, use_relative_attention_bias=True)
    x, options = RNG.normal(size=(ROWS, 140, 6)), {}
    if keys:
        options["key_value_states"] = RNG.normal(size=(ROWS, keys, 6))
    if masked:
        options["mask"] = RNG.integers(0, 2, size=(ROWS, 1, keys or 140))
        options["mask"][..., 0] = 1
    assert clipping.check_rule(randomised(layer, x, **options), x, **options) < 1e-9


def test_t5_attention_with_biases_of_another_layer_or_none():
    x = floats(5, 6)
    without = randomised(T5Attention(is_decoder=False), x)
    assert clipping.check_rule(without, x) < 1e-5
    assert clipping.check_rule(without, x, position_bias=floats(2, 5, 5)) < 1e-5
    layer = randomised(T5Attention(is_decoder=False, use_relative_attention_bias=True), x)
    with pytest.raises(ValueError, match="position_bias"):
        clipping.check_rule(layer, x, position_bias=floats(2, 5, 5))
    with pytest.raises(ValueError, match="cache"):
        clipping.check_rule(layer, x, cache=floats(2, 5, 2, 3))


def test_biases_of_t5_attention_in_bfloat16(bfloat16):
    layer, x = T5Attention(is_decoder=True, use_relative_attention_bias=True), floats(5, 6)
    assert clipping.check_rule(randomised(layer, x), x) < 5e-2


@pytest.mark.parametrize("frozen", [None, "table", "normalization"])
def test_relative_positions_of_deberta(frozen, float64):
    kind = found("keras_hub.src.models.deberta_v3.relative_embedding.RelativeEmbedding")
    layer, x = kind(5, 3), RNG.normal(size=(ROWS, 2, 5))
    layer(x)
    if frozen == "table":
        layer.rel_embeddings.trainable = False
    elif frozen:
        layer.layer_norm.trainable = False
    assert len(layer.trainable_variables) == {None: 3, "table": 2}.get(frozen, 1)
    assert clipping.check_rule(randomised(layer, x), x) < 1e-9


def test_relative_positions_of_deberta_with_another_normalization():
    kind = found("keras_hub.src.models.deberta_v3.relative_embedding.RelativeEmbedding")
    layer = kind(5, 3)
    layer.layer_norm = keras.layers.RMSNormalization()
    assert "RMSNormalization" in rule_of(layer)[1]


def bert():
    return keras_hub.models.BertBackbone(
        vocabulary_size=50, num_layers=2, num_heads=2, hidden_dim=16, intermediate_dim=24
    )


def bert_classifier():
    ids = integers(1, 50, 6)
    x = {"token_ids": ids, "segment_ids": ids % 2, "padding_mask": np.ones_like(ids)}
    model = keras_hub.models.BertTextClassifier(bert(), num_classes=3, preprocessor=None)
    return model, x, integers(0, 3)


def bert_masked_lm():
    ids = integers(1, 50, 6)
    x = {"token_ids": ids, "segment_ids": ids % 2, "padding_mask": np.ones_like(ids)}
    x["mask_positions"] = np.tile([[1, 4]], (ROWS, 1)).astype("int32")
    model = keras_hub.models.BertMaskedLM(bert(), preprocessor=None)
    return model, x, integers(0, 50, 2)


def causal(task, backbone):
    ids = integers(1, 50, 6)
    x = {"token_ids": ids, "padding_mask": np.ones_like(ids)}
    return task(backbone, preprocessor=None), x, integers(0, 50, 6)


def gpt2():
    models = keras_hub.models
    backbone = models.GPT2Backbone(50, 2, 2, 16, 24, max_sequence_length=8)
    return causal(models.GPT2CausalLM, backbone)


def llama():
    models = keras_hub.models
    return causal(models.LlamaCausalLM, models.LlamaBackbone(50, 2, 4, 16, 24, 2))


def gemma_backbone():
    return keras_hub.models.GemmaBackbone(
        vocabulary_size=50,
        num_layers=2,
        num_query_heads=4,
        num_key_value_heads=2,
        hidden_dim=16,
        intermediate_dim=24,
        head_dim=4,
    )


def gemma():
    return causal(keras_hub.models.GemmaCausalLM, gemma_backbone())


def gemma_lora():
    backbone = gemma_backbone()
    backbone.enable_lora(2)
    return causal(keras_hub.models.GemmaCausalLM, backbone)


def vit():
    backbone = keras_hub.models.ViTBackbone((8, 8, 3), (4, 4), 2, 2, 16, 24)
    model = keras_hub.models.ViTImageClassifier(backbone, num_classes=3, preprocessor=None)
    return model, floats(8, 8, 3), integers(0, 3)


def t5():
    backbone = keras_hub.models.T5Backbone(50, 2, 2, 16, 24)
    pooled = keras.layers.GlobalAveragePooling1D()(backbone.output["decoder_sequence_output"])
    model = keras.Model(backbone.input, keras.layers.Dense(3)(pooled))
    ids = integers(1, 50, 6)
    x = {"encoder_token_ids": ids, "decoder_token_ids": ids[:, ::-1]}
    x |= {
        f"{side}_padding_mask": np.tile([1] * 5 + [0], (ROWS, 1)) for side in ("encoder", "decoder")
    }
    return model, x, integers(0, 3)


def deberta():
    backbone = keras_hub.models.DebertaV3Backbone(
        50, 2, 2, 16, 24, max_sequence_length=16, bucket_size=4
    )
    model = keras.Model(backbone.input, keras.layers.Dense(3)(backbone.output[:, 0]))
    ids = integers(1, 50, 6)
    return model, {"token_ids": ids, "padding_mask": np.ones_like(ids)}, integers(0, 3)


@pytest.mark.parametrize(
    "make",
    [bert_classifier, bert_masked_lm, gpt2, llama, gemma, gemma_lora, vit, t5, deberta],
    ids=lambda f: f.__name__,
)
def test_no_layer_of_the_model_is_on_the_general_path(make):
    model, x, y = make()
    model.compile("sgd", keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    clipping.check_model(model, x, y)
    explanation = clipping.explain(model)
    assert explanation.route == "book-keeping", str(explanation)
    assert {route for _, _, route, _ in explanation.rows} <= {"book-keeping", "none"}
    # Every variable, tied tables and position tables too, has a share of the budget.
    groups, shares = clipping.PerLayerClipping().variable_groups(model)
    assert len(groups) == len(model.trainable_variables)
    assert sorted(set(groups)) == list(range(len(shares)))
    np.testing.assert_allclose(sum(shares), 1.0)


def test_tied_embeddings_of_a_masked_language_model():
    """Look-ups and the projection on the vocabulary: both gradients and the cross term."""
    model, x, y = bert_masked_lm()
    for layer in model._flatten_layers():
        if isinstance(layer, keras.layers.Dropout):
            layer.rate = 0.0
    model.compile("sgd", keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    for v in model.trainable_variables:
        v.assign(v + 0.3 * RNG.normal(size=v.shape))
    reference.compare(clipping.clipped_gradients, model, x, y)


def test_a_class_of_the_same_name_elsewhere_has_no_rule():
    class LlamaLayerNorm(keras.layers.Layer):
        pass

    assert "no rule" in rule_of(LlamaLayerNorm())[1]
    # Even one that claims to come from keras_hub.
    LlamaLayerNorm.__module__ = "keras_hub.src.models.llama.llama_layernorm"
    LlamaLayerNorm.__qualname__ = "LlamaLayerNorm"
    assert "no rule" in rule_of(LlamaLayerNorm())[1]
    assert "no rule" in rule_of(type("PositionEmbedding", (keras.layers.Layer,), {})())[1]


def test_keras_hub_is_not_imported_by_the_library():
    for path in pathlib.Path(hub.__file__).parent.rglob("*.py"):
        assert not re.search(r"(import|from) keras_(hub|nlp)", path.read_text()), path
