"""Tiny tasks of keras_hub, made offline: a vocabulary of a few words, and texts of them."""

import io

import keras
import numpy as np

TEXTS = np.array(["the good film", "the bad film was a bad film", "a film", "good"] * 4)
LABELS = np.arange(16) % 2
WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *"the good bad film was a".split()]
_PIECES = ["!", "a", "b", "\u0120", "\u0120a", "\u0120b", "ab", "<|endoftext|>"]

LINES = ["ab a b", "b b", "a ab ab", "b a"] * 4


def tokenizer():
    """A tokenizer of whole words."""
    import keras_hub

    return keras_hub.tokenizers.BertTokenizer(vocabulary=WORDS)


def preprocessor():
    """The preprocessor of BERT."""
    import keras_hub

    return keras_hub.models.BertTextClassifierPreprocessor(tokenizer(), 8)


def classifier(**options):
    """A task with the preprocessor of BERT and a model that is traced quickly."""
    import keras_hub

    class MeanOfWords(keras_hub.models.TextClassifier):
        def __init__(self, preprocessor):
            names = ("token_ids", "segment_ids", "padding_mask")
            inputs = {name: keras.Input((8,), dtype="int32", name=name) for name in names}
            words = keras.layers.Embedding(len(WORDS), 4)(inputs["token_ids"])
            segments = keras.layers.Embedding(2, 4)(inputs["segment_ids"])
            mask = keras.ops.cast(inputs["padding_mask"], "float32")[..., None]
            outputs = keras.layers.Dense(2)(keras.layers.Flatten()((words + segments) * mask))
            self.preprocessor = preprocessor
            super().__init__(inputs=inputs, outputs=outputs)

    keras.utils.set_random_seed(7)
    return MeanOfWords(options.pop("preprocessor", preprocessor()), **options)


def bert_classifier():
    """A classifier of two classes, with its preprocessor."""
    import keras_hub

    keras.utils.set_random_seed(7)
    models = keras_hub.models
    backbone = models.BertBackbone(len(WORDS), 1, 2, 8, 16, dropout=0.0, max_sequence_length=8)
    return models.BertTextClassifier(backbone, 2, preprocessor=preprocessor(), dropout=0.0)


def gpt2():
    """A causal language model, whose preprocessor makes the targets."""
    import keras_hub

    keras.utils.set_random_seed(7)
    models = keras_hub.models
    vocabulary = {piece: number for number, piece in enumerate(_PIECES)}
    merges = ["\u0120 a", "\u0120 b", "a b"]
    tokenizer = keras_hub.tokenizers.GPT2Tokenizer(vocabulary=vocabulary, merges=merges)
    preprocessor = models.GPT2CausalLMPreprocessor(tokenizer, sequence_length=8)
    backbone = models.GPT2Backbone(len(_PIECES), 1, 2, 8, 16, dropout=0.0, max_sequence_length=8)
    return models.GPT2CausalLM(backbone, preprocessor=preprocessor)


def _sentence_pieces(**options):
    """The bytes of a vocabulary of sentence pieces, trained on the lines."""
    import sentencepiece

    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(LINES),
        model_writer=model,
        vocab_size=12,
        hard_vocab_limit=False,
        minloglevel=2,
        **options,
    )
    return model.getvalue()


def gemma():
    """A causal language model with grouped queries, gated layers and a scaled table."""
    import keras_hub

    keras.utils.set_random_seed(7)
    models = keras_hub.models
    tokenizer = models.GemmaTokenizer(
        _sentence_pieces(
            **{"pad_id": 0, "eos_id": 1, "bos_id": 2, "unk_id": 3},
            **{f"{name}_piece": f"<{name}>" for name in ("pad", "eos", "bos", "unk")},
        )
    )
    preprocessor = models.GemmaCausalLMPreprocessor(tokenizer, sequence_length=8)
    backbone = models.GemmaBackbone(
        vocabulary_size=tokenizer.vocabulary_size(),
        num_layers=1,
        num_query_heads=2,
        num_key_value_heads=1,
        hidden_dim=8,
        intermediate_dim=16,
        head_dim=4,
    )
    return models.GemmaCausalLM(backbone, preprocessor=preprocessor)


def llama():
    """A causal language model whose head is a table of its own."""
    import keras_hub

    keras.utils.set_random_seed(7)
    models = keras_hub.models
    tokenizer = models.LlamaTokenizer(_sentence_pieces(unk_id=0, bos_id=1, eos_id=2))
    preprocessor = models.LlamaCausalLMPreprocessor(tokenizer, sequence_length=8)
    backbone = models.LlamaBackbone(tokenizer.vocabulary_size(), 1, 2, 8, 16, 1)
    return models.LlamaCausalLM(backbone, preprocessor=preprocessor)


def image_classifier():
    """A classifier of images, whose preprocessor scales them."""
    import keras_hub

    keras.utils.set_random_seed(7)
    models = keras_hub.models
    backbone = models.ViTBackbone((8, 8, 3), (4, 4), 1, 2, 8, 16)
    converter = keras_hub.layers.ViTImageConverter(image_size=(8, 8), scale=1 / 255.0)
    preprocessor = models.ViTImageClassifierPreprocessor(converter)
    return models.ViTImageClassifier(backbone, num_classes=2, preprocessor=preprocessor)
