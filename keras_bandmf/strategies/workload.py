"""The workload A: the linear system by which training turns gradients, and noise, into weights."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from keras_bandmf._checks import checked_bool, checked_float, checked_int
from keras_bandmf.strategies.errors.banded import WorkloadBlocks

_FIELDS = {"num_steps", "learning_rates", "momentum", "nesterov", "weight_decay"}
# Present only where there are curvatures, so that other configs are those of earlier releases.
_CURVATURE_FIELDS = {"curvatures", "curvature_weights"}
_FLAT = (0.0,)
# Time and memory of a search grow with their number.
MAX_CURVATURES = 64


@dataclasses.dataclass(frozen=True, eq=False)
class Workload:
    """The effect of the gradients on the weights under Keras's SGD, up to sign.

    Row i of A gives the weights w after step i as sums of the gradients g of steps 0 to i:

        v <- momentum v + rate_i g,     w <- (1 - weight_decay rate_i) w + v,

    where Nesterov's momentum adds `momentum v + rate_i g` in place of v. The defaults give prefix
    sums. Instances are immutable and compare by value.

    Noise that has moved the weights also moves the place where the next gradient is taken. In a
    direction in which the loss has the curvature h, the gradient then changes back by h w: that
    direction has a workload of its own, A_h, with `g - h w` in place of g above, and w from before
    the step. With `curvatures`, the squared error of a step is the weighted mean, over them, of the
    squared errors of these workloads. Noise that training itself undoes soon needs no noise of
    later steps to cancel it. (The objective is that of NoiseCurve, arXiv 2510.05416, for plain SGD;
    here it has momentum, weight decay and schedules.)

    Attributes:
      num_steps: n.
      learning_rates: a number, or `(n,)` float64, read-only, one for each step. They are not
        negative, and not all zero. A step of rate zero does not move the weights.
      momentum: in [0, 1).
      nesterov: whether the momentum is Nesterov's.
      weight_decay: the decoupled weight decay of Keras's optimizers. Its product with any learning
        rate is at most 1.
      curvatures: the curvatures h, second derivatives of the loss that the optimizer minimizes:
        not negative, at most `MAX_CURVATURES` of them, and so small that training is stable in
        their directions. A curvature of 0 is a direction without curvature, which is the default.
        Where most gradients are clipped, their curvature is smaller by clip norm / gradient norm.
        Estimate them from public data or from public models only, since they are not noised.
      curvature_weights: one positive weight for each curvature, divided by their sum. None gives
        all the same weight.

    Example:
      >>> import keras_bandmf as bandmf
      >>> workload = bandmf.strategies.Workload(num_steps=3, momentum=0.5)
      >>> identity = bandmf.strategies.ToeplitzStrategy.optimize(
      ...     num_steps=3, num_bands=1, workload=workload)
      >>> identity.per_step_error()
      array([1.    , 3.25  , 6.3125])
      >>> curved = bandmf.strategies.Workload(
      ...     num_steps=3, learning_rates=0.5, curvatures=[0.0, 1.0])
      >>> identity = bandmf.strategies.ToeplitzStrategy([1.0], num_steps=3, workload=curved)
      >>> identity.per_step_error()  # the means of .25, .5, .75 and of .25, .3125, .328125
      array([0.25      , 0.40625   , 0.5390625])
    """

    num_steps: int
    learning_rates: float | np.ndarray = 1.0
    momentum: float = 0.0
    nesterov: bool = False
    weight_decay: float = 0.0
    curvatures: Sequence[float] | np.ndarray = _FLAT
    curvature_weights: Sequence[float] | np.ndarray | None = None

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
        curvatures, weights = _checked_curvatures(self.curvatures, self.curvature_weights)
        object.__setattr__(self, "curvatures", curvatures)
        object.__setattr__(self, "curvature_weights", weights)
        self._check_stability(curvatures)

    @property
    def is_curved(self) -> bool:
        """Whether there are curvatures other than a single 0."""
        return tuple(self.curvatures) != _FLAT

    def _check_stability(self, curvatures: tuple[float, ...]) -> None:
        limit = stable_curvature(
            float(np.max(self.learning_rates)), self.momentum, self.nesterov, self.weight_decay
        )
        largest = max(curvatures)
        if largest > limit * (1.0 + 1e-9):
            raise ValueError(
                f"Expected `curvatures` to be at most {limit:.6g}, beyond which SGD diverges at "
                f"the largest learning rate, {np.max(self.learning_rates):g}, with "
                f"momentum={self.momentum:g}, nesterov={self.nesterov}, "
                f"weight_decay={self.weight_decay:g}. "
                f"Received: a curvature of {largest:.6g}. Leave it out, or train with a smaller "
                "learning rate."
            )

    def blocks(self, block: int) -> WorkloadBlocks:
        """Returns the workload as a linear system in blocks of steps.

        Args:
          block: m, the number of steps in a block.

        Returns:
          Enough blocks for n steps, or one that stands for all of them if the rates are constant.
          The state has (v, w), or w alone without momentum, for each curvature. A step has one
          output for each curvature, times the square root of its weight.

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
        own = 2 if self.momentum else 1
        curvatures, roots = self.curvatures, np.sqrt(np.asarray(self.curvature_weights))
        states, outputs = own * len(curvatures), len(curvatures)
        keep = np.zeros((count, states, states))
        drive = np.zeros((count, states, block))
        read_state = np.zeros((count, block, outputs, states))
        read_input = np.zeros((count, block, outputs, block))
        for k, (curvature, root) in enumerate(zip(curvatures, roots, strict=True)):
            state, output = self._response(rates, float(curvature))
            mine = slice(own * k, own * (k + 1))
            keep[:, mine, mine], drive[:, mine] = state[:, :, :own], state[:, :, own:]
            read_state[:, :, k, mine] = root * output[:, :, :own]
            read_input[:, :, k] = root * output[:, :, own:]
        return WorkloadBlocks(
            keep=keep,
            drive=drive,
            read_state=read_state.reshape(count, block * outputs, states),
            read_input=read_input.reshape(count, block * outputs, block),
        )

    def _response(self, rates: np.ndarray, curvature: float) -> tuple[np.ndarray, np.ndarray]:
        """Returns the states after blocks, and the weights after each step, for one curvature.

        Args:
          rates: `(T, m)` float64.
          curvature: h.

        Returns:
          `(T, q, q + m)` and `(T, m, q + m)` float64: row k of the first says how state k depends
          on the q states before the block and on its m inputs.
        """
        count, block = rates.shape
        states = 2 if self.momentum else 1
        state = np.zeros((count, states, states + block))
        state[:, :, :states] = np.eye(states)
        outputs = np.empty((count, block, states + block))
        for i in range(block):
            rate = rates[:, i, None]
            gradient = -curvature * state[:, -1]
            gradient[:, states + i] += 1.0
            step = rate * gradient
            if self.momentum:
                state[:, 0] = self.momentum * state[:, 0] + step
                step = self.momentum * state[:, 0] + step if self.nesterov else state[:, 0]
            state[:, -1] = (1.0 - self.weight_decay * rate) * state[:, -1] + step
            outputs[:, i] = state[:, -1]
        return state, outputs

    def get_config(self) -> dict[str, Any]:
        """Returns a dict for JSON from which `from_config` restores the workload exactly."""
        rates = self.learning_rates
        return {
            "num_steps": self.num_steps,
            "learning_rates": rates if isinstance(rates, float) else rates.tolist(),
            "momentum": self.momentum,
            "nesterov": self.nesterov,
            "weight_decay": self.weight_decay,
            **self._curvature_config(),
        }

    def _curvature_config(self) -> dict[str, Any]:
        if not self.is_curved:
            return {}
        weights = np.asarray(self.curvature_weights)
        return {"curvatures": list(self.curvatures), "curvature_weights": weights.tolist()}

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
        known = (_FIELDS, _FIELDS | _CURVATURE_FIELDS)
        if not isinstance(config, dict) or set(config) not in known:
            raise ValueError(
                f"Expected the config of a Workload to be a dict with the keys {sorted(_FIELDS)}, "
                f"or with {sorted(_CURVATURE_FIELDS)} as well. Received: config={config!r}. Pass "
                "what `get_config()` returned."
            )
        return cls(**config)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Workload) and self.get_config() == other.get_config()

    def __repr__(self) -> str:
        fields = ("num_steps", "momentum", "nesterov", "weight_decay")
        named = [f"{name}={getattr(self, name)}" for name in fields]
        if self.is_curved:
            named.append(f"curvatures={list(self.curvatures)}")
        return f"Workload({', '.join(named)})"

    def __hash__(self) -> int:
        rates = np.asarray(self.learning_rates).tobytes()
        curved = tuple(self.curvatures)
        return hash(
            (self.num_steps, rates, self.momentum, self.nesterov, self.weight_decay, curved)
        )


def stable_curvature(
    learning_rate: float, momentum: float = 0.0, nesterov: bool = False, weight_decay: float = 0.0
) -> float:
    """Returns the largest curvature at which Keras's SGD does not diverge.

    In a direction of curvature h, a step maps (v, w) by a matrix of trace `T = 1 + momentum - r
    (weight_decay + a h)` and determinant `D = momentum (1 - r (weight_decay + c h))`, where
    (a, c) = (1, 0), or (1 + momentum, 1) with Nesterov's momentum. Its eigenvalues are at most 1 in
    absolute value if `|D| <= 1` and `|T| <= 1 + D`, and of these `-T <= 1 + D` fails first.

    Args:
      learning_rate: r, positive.
      momentum: in [0, 1).
      nesterov: whether the momentum is Nesterov's.
      weight_decay: decoupled; at most 1 / r.

    Returns:
      The curvature at which the eigenvalue -1 is reached.
    """
    span = 1.0 + 2.0 * momentum if nesterov else 1.0
    return (1.0 + momentum) * (2.0 - learning_rate * weight_decay) / (learning_rate * span)


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


def num_curvatures(workload: Workload | None) -> int:
    """Returns the number of curvatures of a workload, which is that of the outputs of a step."""
    return 1 if workload is None else len(workload.curvatures)


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


def _checked_curvatures(
    curvatures: object, weights: object
) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Returns the curvatures, and their weights of sum 1, as tuples of floats."""
    found = _checked_vector("curvatures", curvatures, f"1 to {MAX_CURVATURES} finite numbers")
    if not 1 <= len(found) <= MAX_CURVATURES:
        raise ValueError(
            f"Expected `curvatures` to be 1 to {MAX_CURVATURES} finite numbers. Received: "
            f"{len(found)} curvatures. Join those that are close, and add up their weights."
        )
    if np.min(found) < 0.0:
        raise ValueError(
            "Expected `curvatures` not to be negative. Received: curvatures from "
            f"{np.min(found):g} to {np.max(found):g}. Leave out directions of negative curvature, "
            "or count them as 0."
        )
    if weights is None:
        shares = np.ones(len(found))
    else:
        expected = f"{len(found)} positive numbers, one for each curvature"
        shares = _checked_vector("curvature_weights", weights, expected)
        if len(shares) != len(found) or not np.all(shares > 0.0):
            raise ValueError(
                f"Expected `curvature_weights` to be {expected}. Received: curvature_weights="
                f"{weights!r}. Leave them out for equal ones."
            )
    total = math.fsum(shares / np.max(shares)) * np.max(shares)
    # Weights of sum 1 to rounding are left alone, so that configs keep every bit.
    if abs(total - 1.0) > 8.0 * np.finfo(np.float64).eps:
        shares = shares / total
    return tuple(found.tolist()), tuple(shares.tolist())


def _checked_vector(name: str, values: object, expected: str) -> np.ndarray:
    """Returns a vector of finite float64 numbers, or refuses what was received."""
    try:
        array = np.array(values)
    except (TypeError, ValueError):  # Ragged input is refused below.
        array = np.array(None)
    if array.dtype.kind not in "fiu" or array.ndim != 1 or not np.all(np.isfinite(array)):
        raise ValueError(
            f"Expected `{name}` to be {expected}. Received: {name}={values!r}. Pass a list."
        )
    return array.astype(np.float64)


def workload_config(workload: Workload | None) -> dict[str, Any]:
    """Returns what a strategy's config says about its workload: nothing for prefix sums."""
    return {} if workload is None else {"workload": workload.get_config()}


def workload_of(config: dict[str, Any]) -> Workload | None:
    """Returns the workload in a strategy's config, or None, for prefix sums, if it has none."""
    return Workload.from_config(config["workload"]) if "workload" in config else None
