"""The workload A: the linear system by which training turns gradients, and noise, into weights."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np

from keras_bandmf._checks import checked_bool, checked_float, checked_int
from keras_bandmf.strategies.errors.banded import WorkloadBlocks

_FIELDS = {"num_steps", "learning_rates", "momentum", "nesterov", "weight_decay"}


@dataclasses.dataclass(frozen=True, eq=False)
class Workload:
    """The effect of the gradients on the weights under Keras's SGD, up to sign.

    Row i of A gives the weights w after step i as sums of the gradients g of steps 0 to i:

        v <- momentum v + rate_i g,     w <- (1 - weight_decay rate_i) w + v,

    where Nesterov's momentum adds `momentum v + rate_i g` in place of v. The defaults give prefix
    sums. Instances are immutable and compare by value.

    Attributes:
      num_steps: n.
      learning_rates: a number, or `(n,)` float64, read-only, one for each step. They are not
        negative, and not all zero. A step of rate zero does not move the weights.
      momentum: in [0, 1).
      nesterov: whether the momentum is Nesterov's.
      weight_decay: the decoupled weight decay of Keras's optimizers. Its product with any learning
        rate is at most 1.

    Example:
      >>> import keras_bandmf as bandmf
      >>> workload = bandmf.strategies.Workload(num_steps=3, momentum=0.5)
      >>> identity = bandmf.strategies.ToeplitzStrategy.optimize(
      ...     num_steps=3, num_bands=1, workload=workload)
      >>> identity.per_step_error()
      array([1.    , 3.25  , 6.3125])
    """

    num_steps: int
    learning_rates: float | np.ndarray = 1.0
    momentum: float = 0.0
    nesterov: bool = False
    weight_decay: float = 0.0

    def __post_init__(self) -> None:
        n = checked_int("num_steps", self.num_steps)
        rates = _checked_rates(self.learning_rates, n)
        nesterov = checked_bool("nesterov", self.nesterov)
        momentum = checked_float("momentum", self.momentum, minimum=0.0)
        if momentum >= 1.0:
            raise ValueError(
                f"Expected `momentum` to be below 1. Received: momentum={momentum}. Use 0.9, say."
            )
        decay = checked_float("weight_decay", self.weight_decay, minimum=0.0)
        if decay * np.max(rates) > 1.0:
            raise ValueError(
                "Expected `weight_decay` times the largest learning rate to be at most 1, since "
                f"the weights would change sign. Received: weight_decay={decay}, largest rate "
                f"{np.max(rates)}. Use a smaller weight decay."
            )
        object.__setattr__(self, "num_steps", n)
        object.__setattr__(self, "learning_rates", rates)
        object.__setattr__(self, "momentum", momentum)
        object.__setattr__(self, "nesterov", nesterov)
        object.__setattr__(self, "weight_decay", decay)

    def blocks(self, block: int) -> WorkloadBlocks:
        """Returns the workload as a linear system in blocks of steps.

        Args:
          block: m, the number of steps in a block.

        Returns:
          Enough blocks for n steps, or one that stands for all of them if the rates are constant.
          The state is (v, w), or w alone without momentum.

        Example:
          >>> import keras_bandmf as bandmf
          >>> bandmf.strategies.Workload(num_steps=6).blocks(3).read_input
          array([[[1., 0., 0.],
                  [1., 1., 0.],
                  [1., 1., 1.]]])
        """
        constant = isinstance(self.learning_rates, float)
        count = 1 if constant else -(-self.num_steps // block)
        padded = np.zeros(count * block)
        padded[: block if constant else self.num_steps] = self.learning_rates
        rates = padded.reshape(count, block)
        states = 2 if self.momentum else 1
        # Row k of `state` says how state k depends on the states before the block and its inputs.
        state = np.zeros((count, states, states + block))
        state[:, :, :states] = np.eye(states)
        outputs = np.empty((count, block, states + block))
        for i in range(block):
            rate = rates[:, i, None]
            step: float | np.ndarray = 0.0
            if self.momentum:
                state[:, 0] *= self.momentum
                state[:, 0, states + i] += rates[:, i]
                step = state[:, 0]
            if self.nesterov:
                step = self.momentum * step
            state[:, -1] = (1.0 - self.weight_decay * rate) * state[:, -1] + step
            if self.nesterov or not self.momentum:
                state[:, -1, states + i] += rates[:, i]
            outputs[:, i] = state[:, -1]
        return WorkloadBlocks(
            keep=state[:, :, :states].copy(),
            drive=state[:, :, states:].copy(),
            read_state=outputs[:, :, :states].copy(),
            read_input=outputs[:, :, states:].copy(),
        )

    def get_config(self) -> dict[str, Any]:
        """Returns a dict for JSON from which `from_config` restores the workload exactly."""
        rates = self.learning_rates
        return {
            "num_steps": self.num_steps,
            "learning_rates": rates if isinstance(rates, float) else rates.tolist(),
            "momentum": self.momentum,
            "nesterov": self.nesterov,
            "weight_decay": self.weight_decay,
        }

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> Workload:
        """Restores a workload from what `get_config()` returned.

        Args:
          config: the dict, perhaps through JSON.

        Returns:
          An equal workload.

        Raises:
          TypeError: if a field has the wrong type.
          ValueError: if a field is missing, unknown, or out of its range.
        """
        if not isinstance(config, dict) or set(config) != _FIELDS:
            raise ValueError(
                f"Expected the config of a Workload to be a dict with the keys {sorted(_FIELDS)}. "
                f"Received: config={config!r}. Pass what `get_config()` returned."
            )
        return cls(**config)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Workload) and self.get_config() == other.get_config()

    def __repr__(self) -> str:
        return (
            f"Workload(num_steps={self.num_steps}, momentum={self.momentum}, "
            f"nesterov={self.nesterov}, weight_decay={self.weight_decay})"
        )

    def __hash__(self) -> int:
        rates = np.asarray(self.learning_rates).tobytes()
        return hash((self.num_steps, rates, self.momentum, self.nesterov, self.weight_decay))


def checked_workload(workload: object, num_steps: int) -> Workload | None:
    """Returns `workload` if it is None or a workload of `num_steps` steps.

    Args:
      workload: what was received. None stands for prefix sums.
      num_steps: n.

    Returns:
      The workload, or None.

    Raises:
      TypeError: if it is anything else.
      ValueError: if it is a workload of another number of steps.
    """
    if workload is None:
        return None
    message = (
        f"Expected `workload` to be a `Workload` of {num_steps} steps, or None for prefix sums. "
        f"Received: workload={workload!r}. Make one with `Workload(num_steps={num_steps}, ...)`."
    )
    if not isinstance(workload, Workload):
        raise TypeError(message)
    if workload.num_steps != num_steps:
        raise ValueError(message)
    return workload


def blocks_of(workload: Workload | None, num_steps: int, block: int) -> WorkloadBlocks:
    """Returns a workload in blocks of steps. None stands for prefix sums."""
    return (workload or Workload(num_steps)).blocks(block)


def _checked_rates(rates: object, num_steps: int) -> float | np.ndarray:
    """Returns the learning rates as a positive float, or as a read-only vector of n floats."""
    try:
        array = np.array(rates)
    except (TypeError, ValueError):  # Ragged input is refused below.
        array = np.array(None)
    if array.dtype.kind not in "fiu" or array.shape not in ((), (num_steps,)):
        raise ValueError(
            f"Expected `learning_rates` to be a number or a vector of {num_steps} numbers, one for "
            f"each step. Received: learning_rates of shape {array.shape} and dtype {array.dtype}. "
            "Evaluate the schedule at every step."
        )
    array = array.astype(np.float64)
    if not (np.all(np.isfinite(array)) and np.all(array >= 0.0) and np.any(array > 0.0)):
        raise ValueError(
            "Expected `learning_rates` to be finite, not negative, and not all zero. Received: "
            f"learning_rates from {np.min(array)} to {np.max(array)}. Check the schedule."
        )
    if array.ndim == 0:
        return float(array)
    array.flags.writeable = False
    return array


def workload_config(workload: Workload | None) -> dict[str, Any]:
    """Returns what a strategy's config says about its workload: nothing for prefix sums."""
    return {} if workload is None else {"workload": workload.get_config()}


def workload_of(config: dict[str, Any]) -> Workload | None:
    """Returns the workload in a strategy's config, or None, for prefix sums, if it has none."""
    return Workload.from_config(config["workload"]) if "workload" in config else None
