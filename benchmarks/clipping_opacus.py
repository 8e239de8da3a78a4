"""Steps of opacus on models of the same shapes in PyTorch, for `clipping.py`.

For an environment with `torch` and `opacus`. No noise: the multiplier is zero.
"""

from __future__ import annotations

import sys

import torch
from clipping_measure import Sizes, Step, answer, data
from opacus.grad_sample import GradSampleModule, GradSampleModuleFastGradientClipping
from opacus.layers import DPLSTM
from opacus.optimizers import DPOptimizer, DPOptimizerFastGradientClipping
from opacus.utils.fast_gradient_clipping_utils import DPLossFastGradientClipping
from torch import nn


class Attention(nn.Module):
    """Self-attention with four heads, of plain products: its layers are linear ones."""

    def __init__(self, hidden: int, heads: int = 4):
        super().__init__()
        self.heads = heads
        self.query, self.key, self.value, self.output = (
            nn.Linear(hidden, hidden) for _ in range(4)
        )

    def forward(self, x, mask):
        batch, tokens, hidden = x.shape
        q, k, v = (
            part(x).reshape(batch, tokens, self.heads, -1).transpose(1, 2)
            for part in (self.query, self.key, self.value)
        )
        scores = q @ k.transpose(2, 3) / (hidden // self.heads) ** 0.5
        scores = scores.masked_fill(mask[:, None, None, :] == 0, float("-inf"))
        mixed = (scores.softmax(-1) @ v).transpose(1, 2).reshape(batch, tokens, hidden)
        return self.output(mixed)


class Block(nn.Module):
    """A layer of BERT."""

    def __init__(self, hidden: int):
        super().__init__()
        self.attention, self.first = Attention(hidden), nn.LayerNorm(hidden)
        self.feed = nn.Sequential(
            nn.Linear(hidden, 4 * hidden), nn.GELU(), nn.Linear(4 * hidden, hidden)
        )
        self.second = nn.LayerNorm(hidden)

    def forward(self, x, mask):
        x = self.first(x + self.attention(x, mask))
        return self.second(x + self.feed(x))


class Bert(nn.Module):
    """BERT, its pooler and a linear layer."""

    def __init__(self, sizes: Sizes):
        super().__init__()
        self.tokens = nn.Embedding(sizes.vocabulary, sizes.hidden)
        self.segments = nn.Embedding(2, sizes.hidden)
        self.positions = nn.Embedding(sizes.tokens, sizes.hidden)
        self.normed = nn.LayerNorm(sizes.hidden)
        self.blocks = nn.ModuleList(Block(sizes.hidden) for _ in range(sizes.blocks))
        self.pooler = nn.Linear(sizes.hidden, sizes.hidden)
        self.classes = nn.Linear(sizes.hidden, 10)

    def forward(self, x):
        ids = x["token_ids"]
        # One row of positions an example, as opacus has it.
        at = torch.arange(ids.shape[1]).repeat(len(ids), 1)
        found = self.tokens(ids) + self.segments(x["segment_ids"]) + self.positions(at)
        found = self.normed(found)
        for block in self.blocks:
            found = block(found, x["padding_mask"])
        return self.classes(torch.tanh(self.pooler(found[:, 0])))


class MeanEmbedding(nn.Module):
    """A large table, the mean over the tokens and two linear layers."""

    def __init__(self, sizes: Sizes):
        super().__init__()
        self.table = nn.Embedding(sizes.rows, sizes.width)
        self.rest = nn.Sequential(nn.Linear(sizes.width, 128), nn.ReLU(), nn.Linear(128, 10))

    def forward(self, x):
        return self.rest(self.table(x).mean(1))


class LastOutput(nn.Module):
    """An LSTM over a sequence, and a linear layer on its last output.

    Its layer is PyTorch's own in the plain step and opacus's DPLSTM in private ones, since opacus
    takes no other.
    """

    def __init__(self, sizes: Sizes, layer: type[nn.Module]):
        super().__init__()
        self.recurrent = layer(sizes.features, sizes.units_over_time, batch_first=True)
        self.classes = nn.Linear(sizes.units_over_time, 10)

    def forward(self, x):
        return self.classes(self.recurrent(x)[0][:, -1])


def build(name: str, sizes: Sizes, private: bool = False) -> nn.Module:
    """The model of that name."""
    torch.manual_seed(0)
    if name == "mlp":
        u = sizes.units
        hidden = (nn.Linear(784, u), nn.ReLU(), nn.Linear(u, u), nn.ReLU())
        return nn.Sequential(*hidden, nn.Linear(u, 10))
    if name == "cnn":
        f = sizes.filters
        convolutions = (nn.Conv2d(1, f, 3), nn.ReLU(), nn.Conv2d(f, 2 * f, 3), nn.ReLU())
        dense = (nn.Linear(12 * 12 * 2 * f, 128), nn.ReLU(), nn.Linear(128, 10))
        return nn.Sequential(*convolutions, nn.MaxPool2d(2), nn.Flatten(), *dense)
    if name == "lstm":
        return LastOutput(sizes, DPLSTM if private else nn.LSTM)
    return {"bert": Bert, "embedding": MeanEmbedding}[name](sizes)


def tensors(name: str, batch: int, sizes: Sizes) -> tuple:
    """(x, y) as PyTorch has them: channels first, integers of 64 bits."""
    x, y = data(name, batch, sizes)
    if name == "bert":
        x = {key: torch.from_numpy(value).long() for key, value in x.items()}
    elif name == "cnn":
        x = torch.from_numpy(x).permute(0, 3, 1, 2).contiguous()
    else:
        x = torch.from_numpy(x)
    return x, torch.from_numpy(y).long()


def _step(model, optimizer, criterion, x, y) -> Step:
    def step():
        optimizer.zero_grad()
        loss = criterion(model(x), y)
        loss.backward()
        optimizer.step()
        return loss.item()

    return step


def plain(name: str, batch: int, sizes: Sizes) -> Step:
    """Forward, backward, update."""
    model = build(name, sizes)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    return _step(model, optimizer, nn.CrossEntropyLoss(), *tensors(name, batch, sizes))


def hooks(name: str, batch: int, sizes: Sizes) -> Step:
    """The default mode: gradients of every example, written out."""
    model = GradSampleModule(build(name, sizes, private=True))
    optimizer = DPOptimizer(
        torch.optim.SGD(model.parameters(), lr=1e-3),
        noise_multiplier=0.0,
        max_grad_norm=1.0,
        expected_batch_size=batch,
    )
    return _step(model, optimizer, nn.CrossEntropyLoss(), *tensors(name, batch, sizes))


def ghost(name: str, batch: int, sizes: Sizes) -> Step:
    """Ghost clipping: norms first, then a second backward pass."""
    model = GradSampleModuleFastGradientClipping(
        build(name, sizes, private=True), max_grad_norm=1.0, use_ghost_clipping=True
    )
    optimizer = DPOptimizerFastGradientClipping(
        torch.optim.SGD(model.parameters(), lr=1e-3),
        noise_multiplier=0.0,
        max_grad_norm=1.0,
        expected_batch_size=batch,
    )
    criterion = DPLossFastGradientClipping(model, optimizer, nn.CrossEntropyLoss())
    return _step(model, optimizer, criterion, *tensors(name, batch, sizes))


STEPS = {"plain": plain, "hooks": hooks, "ghost": ghost}

if __name__ == "__main__":
    answer(STEPS, sys.argv[1])
