"""A causal language model tuned with LoRA: not private, by DP-SGD and by BandMF, tuned alike.

    python examples/perplexity.py --output perplexity --epsilon 4

Downloads nothing: the model and the texts are those of lora_language_model.py. A small GPT-2 is
trained once on the documentation of Python, which is public; sentences of the docstrings of NumPy
and SciPy stand in for private texts, each of which counts as the text of one person. A tenth of
them is held out to choose learning rates, and a tenth is the test set. See tuned.py for how the
mechanisms are tuned. What is compared is the perplexity of a token.
"""

from __future__ import annotations

import argparse
import os

import tuned  # first, for it imports `quiet`

import keras
import keras_hub
import lora_language_model as language
import numpy as np

import keras_bandmf as bandmf


def main(arguments: list[str] | None = None) -> None:
    """Tunes, trains, and prints a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    tuned.add_arguments(
        parser,
        epsilon=4.0,
        batch_size=128,
        epochs=4,
        l2_norm_clip=0.1,
        rates=[2.5e-3, 5e-3, 1e-2, 2e-2],
        plain_rates=[2.5e-3, 5e-3, 1e-2, 2e-2],
    )
    parser.add_argument("--length", type=int, default=32, help="tokens of a text")
    parser.add_argument("--rank", type=int, default=4, help="of LoRA")
    parser.add_argument("--public_epochs", type=int, default=8)
    parser.add_argument("--most", type=int, help="the number of texts to take at most")
    options = parser.parse_args(arguments)
    texts = language.private_texts()
    texts = list(np.random.default_rng(0).permutation(texts)[: options.most])
    cut = len(texts) // 10
    data = {"test": texts[:cut], "held out": texts[cut : 2 * cut], "train": texts[2 * cut :]}
    model_of = f"{options.length}-{options.public_epochs}-{options.most or 'all'}"
    public = options.output / f"public-{model_of}"
    if not public.exists():
        keras.utils.set_random_seed(0)
        model = language.small_model(
            language.public_texts()[: options.most], options.length, options.public_epochs
        )
        # Under its name only when it is whole: another process takes what it finds there.
        unfinished = public.with_name(f"{public.name}-{os.getpid()}")
        model.save_to_preset(str(unfinished))
        unfinished.rename(public)
    before = keras_hub.models.CausalLM.from_preset(str(public))
    print(f"{len(data['train'])} texts to train on; perplexity before, on the test set: ", end="")
    before.compile()
    print(f"{language.perplexity(before, data['test']):.2f}", flush=True)

    def train(
        mechanism: tuned.Mechanism, plan: bandmf.TrainingPlan | None, rate: float
    ) -> keras.Model:
        model = keras_hub.models.CausalLM.from_preset(str(public))
        model.backbone.enable_lora(options.rank)
        optimizer = keras.optimizers.Adam(rate)
        if plan is None:
            model.compile(optimizer=optimizer)
            model.fit(
                data["train"], batch_size=options.batch_size, epochs=options.epochs, verbose=0
            )
            return model
        model = bandmf.privatize(model)
        optimizer = bandmf.BandMFOptimizer(
            optimizer, plan, options.l2_norm_clip, clipping=options.clipping
        )
        model.compile(optimizer=optimizer)
        model.fit(plan.batches(data["train"]), epochs=options.epochs, verbose=0)
        return model

    task = tuned.Task(
        f"perplexity-{model_of}-{options.rank}",
        data,
        train,
        len(data["train"]),
        language.perplexity,
        best=min,
        measure="perplexity",
    )
    tuned.compare(options, task, tuned.mechanisms(options))


if __name__ == "__main__":
    main()
