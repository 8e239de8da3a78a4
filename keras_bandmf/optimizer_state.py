"""The secret state of a private run: its keys and its noise, and how they are saved."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from keras_bandmf.noise import CorrelatedNoise, NoiseRows, normals

_FORMAT = 1
_FIELDS = ("format", "fingerprint", "run_key", "noise_key", "noise_ring", "seeded", "restores")


class RunState:
    """Keys, noise ring and provenance of one run.

    A plain object on purpose: Keras and TensorFlow do not find its variables, so that it leaves
    the process only through `to_arrays`.

    Formal guarantees:
        The run key comes from the operating system unless `seed` is given. Noise and sampler use
        one-way folds of it. `from_arrays` refuses whatever does not belong to `fingerprint`; by
        default it draws a new noise key, so the noise after a restore is independent of every
        row drawn before, given the ring, and `C^-1 Z` keeps its law. The sampler's key is always
        kept: new groups would let an example take part in adjacent steps.

    Args:
        strategy: defines `C` of the noise.
        stddev: standard deviation of `Z`.
        shapes: shapes of the gradients.
        fingerprint: what the state belongs to (plan, clip norm, variables), hexadecimal.
        seed: for tests only.
    """

    def __init__(
        self,
        strategy: NoiseRows,
        stddev: float,
        shapes: Sequence[Sequence[int]],
        fingerprint: str,
        seed: int | None = None,
    ):
        self.fingerprint = fingerprint
        self.seeded = seed is not None
        self.restores = 0
        self.replayed = False
        self._run_key = normals.key_from_seed(seed) if self.seeded else normals.fresh_key()
        self.noise = CorrelatedNoise(strategy, stddev, shapes)
        self.noise.set_key(normals.fold_key(self._run_key, "noise"))

    @property
    def sampler_key(self) -> np.ndarray:
        """The key of the batches of this run, shape (2,), uint64. Secret."""
        return normals.fold_key(self._run_key, "sampler")

    def to_arrays(self) -> dict[str, np.ndarray]:
        """Returns all of the state. Whoever reads it can subtract the noise."""
        return {
            "format": np.array(_FORMAT, np.int32),
            "fingerprint": np.frombuffer(self.fingerprint.encode(), np.uint8),
            "run_key": self._run_key.view(np.int64),
            "noise_key": self.noise.get_key().view(np.int64),
            "noise_ring": self.noise.get_ring(),
            "seeded": np.array(self.seeded, np.int32),
            "restores": np.array(self.restores, np.int32),
        }

    def from_arrays(self, arrays: Mapping[str, np.ndarray], replay: bool) -> None:
        """Takes over what `to_arrays` returned in an earlier process.

        Args:
            arrays: the saved state.
            replay: keep the noise key too, to repeat unreleased steps bit for bit.

        Raises:
            ValueError: if the state is incomplete, damaged, or of another run.
        """
        missing = [name for name in _FIELDS if name not in arrays]
        if missing:
            raise ValueError(
                "The checkpoint holds no state of BandMFOptimizer, or only a part of it. "
                f"Missing: {', '.join(missing)}. Received: {sorted(arrays)}. Load weights alone "
                "from a file saved without an optimizer, or start a new run."
            )
        values = {name: np.asarray(arrays[name]) for name in _FIELDS}
        if int(values["format"]) != _FORMAT:
            raise ValueError(
                f"The optimizer state must be of format {_FORMAT}. "
                f"Received: format={int(values['format'])}. Use the version of keras_bandmf that "
                "wrote it."
            )
        saved = values["fingerprint"].astype(np.uint8).tobytes().decode(errors="replace")
        if saved != self.fingerprint:
            raise ValueError(
                "The checkpoint belongs to another run: plan, clip norm, inner optimizer or the "
                "shapes of the trainable variables differ. Continuing it here would void the "
                f"privacy guarantee. Expected fingerprint: {self.fingerprint}. Received: {saved}"
            )
        for name in ("run_key", "noise_key"):
            if values[name].shape != (2,) or values[name].dtype != np.int64:
                raise ValueError(
                    f"`{name}` in the checkpoint must have shape (2,) and dtype int64. Received: "
                    f"{values[name].shape}, {values[name].dtype}. The file is damaged."
                )
        self.noise.set_ring(values["noise_ring"])
        self._run_key = values["run_key"].view(np.uint64).copy()
        if replay:
            self.noise.set_key(values["noise_key"].view(np.uint64))
        else:
            self.noise.set_key(normals.fresh_key())
        self.seeded = bool(values["seeded"])
        self.restores = int(values["restores"]) + 1
        self.replayed = replay
