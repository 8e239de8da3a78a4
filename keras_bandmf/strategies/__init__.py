"""Strategies: the matrices C that say how the noise of different steps is correlated."""

from __future__ import annotations

from typing import Any

from keras_bandmf._checks import checked_choice
from keras_bandmf.strategies.banded import BandedStrategy
from keras_bandmf.strategies.banded_inverse import BandedInverseStrategy
from keras_bandmf.strategies.base import Strategy
from keras_bandmf.strategies.baselines.buffered import BufferedToeplitzStrategy
from keras_bandmf.strategies.baselines.tree import TreeStrategy
from keras_bandmf.strategies.block_diagonal import BlockDiagonalStrategy
from keras_bandmf.strategies.search.scipy_lbfgs import Progress
from keras_bandmf.strategies.toeplitz import ToeplitzStrategy
from keras_bandmf.strategies.workload import Workload

__all__ = [
    "BandedInverseStrategy",
    "BandedStrategy",
    "BlockDiagonalStrategy",
    "BufferedToeplitzStrategy",
    "Progress",
    "Strategy",
    "ToeplitzStrategy",
    "TreeStrategy",
    "Workload",
    "from_config",
]

_KINDS: tuple[type[Strategy], ...] = (
    BandedInverseStrategy,
    BandedStrategy,
    BlockDiagonalStrategy,
    BufferedToeplitzStrategy,
    ToeplitzStrategy,
    TreeStrategy,
)
_CLASSES = {kind.__name__: kind for kind in _KINDS}


def from_config(config: dict[str, Any]) -> Strategy:
    """Restores a strategy of any class of this package from its `get_config()`.

    Args:
      config: the dict, perhaps through JSON. Its "class_name" says which class.

    Returns:
      A strategy that equals the one that wrote `config`.

    Raises:
      TypeError: if a field has the wrong type.
      ValueError: if `config` is not a dict, names an unknown class, or does not fit that class.

    Example:
      >>> import json
      >>> import keras_bandmf as bandmf
      >>> strategy = bandmf.strategies.ToeplitzStrategy.optimize(num_steps=100, num_bands=4)
      >>> text = json.dumps(strategy.get_config())
      >>> bandmf.strategies.from_config(json.loads(text)) == strategy
      True
    """
    if not isinstance(config, dict) or "class_name" not in config:
        raise ValueError(
            "Expected the config of a strategy to be a dict with a 'class_name'. "
            f"Received: config={config!r}. Pass what `get_config()` returned."
        )
    name = checked_choice("class_name", config["class_name"], tuple(_CLASSES))
    return _CLASSES[name].from_config(config)


def __dir__() -> list[str]:
    return __all__
