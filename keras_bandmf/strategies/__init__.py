"""Strategies: which correlation the noise has."""

from __future__ import annotations

from keras_bandmf._checks import checked_choice
from keras_bandmf.strategies.banded import BandedStrategy
from keras_bandmf.strategies.baselines.banded_inverse import BandedInverseStrategy
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
    "ToeplitzStrategy",
    "TreeStrategy",
    "Workload",
    "from_config",
]

_KINDS = (
    BandedInverseStrategy,
    BandedStrategy,
    BlockDiagonalStrategy,
    BufferedToeplitzStrategy,
    ToeplitzStrategy,
    TreeStrategy,
)
_CLASSES = {kind.__name__: kind for kind in _KINDS}


def from_config(
    config: dict,
) -> (
    BandedInverseStrategy
    | BandedStrategy
    | BlockDiagonalStrategy
    | BufferedToeplitzStrategy
    | ToeplitzStrategy
    | TreeStrategy
):
    """Restores a strategy of any class from its `get_config()`.

    Args:
      config: the dict, perhaps through JSON; its "class_name" says which class.

    Returns:
      A strategy equal to the one that wrote `config`.

    Raises:
      ValueError: `config` is not a dict, names an unknown class, or does not fit that class.
    """
    if not isinstance(config, dict) or "class_name" not in config:
        raise ValueError(
            "The config of a strategy must be a dict with a 'class_name'. "
            f"Received: config={config!r}. Pass what `get_config()` returned."
        )
    name = checked_choice("class_name", config["class_name"], tuple(_CLASSES))
    return _CLASSES[name].from_config(config)


def __dir__() -> list[str]:
    return __all__
