"""The secret state of a private run: its keys and its noise, and how they are saved."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence

import numpy as np
import tensorflow as tf

from keras_bandmf import _distribution
from keras_bandmf._checks import PrivacyError
from keras_bandmf.clipping import ClippedGradients, MaskSeeds
from keras_bandmf.clipping.seeds import STEP_BITS
from keras_bandmf.noise import NoiseRows, NoiseTaps, normals
from keras_bandmf.noise.regenerated import noise_of
from keras_bandmf.optimizers.adapted_norm import COUNT_SHAPE, AdaptedNorm
from keras_bandmf.rgp.run import RunCarriers

# 2: the ring holds whole numbers. 3: there is a clip norm, 0 where it is fixed.
_FORMAT = 3
# Shapes of the saved values; None where the length varies and is checked elsewhere.
_FIELDS: dict[str, tuple[type, tuple[int, ...] | None]] = {
    "format": (np.int32, ()),
    "fingerprint": (np.uint8, None),
    "sampler_key": (np.int64, (2,)),
    "noise_key": (np.int64, None),
    "mask_key": (np.int64, None),
    "noise_ring": (np.int32, None),
    "position": (np.int64, ()),
    "data_digest": (np.uint8, None),
    "seeded": (np.int32, ()),
    "restores": (np.int32, ()),
    "clip_norm": (np.float32, ()),
}


class RunState:
    """Keys, noise and provenance of one run.

    It is a plain object on purpose: Keras and TensorFlow do not find its variables, so they leave
    the process only through `to_arrays`.

    Formal guarantees:
        The run key comes from the operating system unless `seed` is given; noise, sampler,
        carriers and dropout masks use one-way folds of it, and it is not kept. With several worker
        processes all of them use the chief's key, and `check_workers` refuses processes that do
        not do the same. `from_arrays` refuses whatever does not belong to `fingerprint`; by default
        it draws a new noise key, so the noise after a restore is independent of every row drawn
        before, given the ring, and `C^-1 Z` keeps its law. The key of the masks is kept or redrawn
        together with that of the noise: otherwise, steps that are repeated on other replicas or in
        other microbatches would share random bits with the first try. The sampler's key is always
        kept, and `accept_data` refuses other rows or another order: new groups would let an example
        take part in adjacent steps.

    Args:
        strategy: The strategy, which defines `C` of the noise.
        stddev: The standard deviation of `Z`.
        shapes: The shapes of the gradients.
        fingerprint: What the state belongs to (plan, clip norm, variables), in hexadecimal digits.
        seed: A fixed seed, for tests only.
        carriers: The low-rank carriers of the variables, which are started here; None for none.
        exact_noise: Whether to round the noise as real numbers are rounded.
        adapted: The clip norm of adaptive clipping. The last of `shapes` is then that of its count.

    Raises:
        ValueError: If the run has too many steps, or the noise cannot be made.
    """

    def __init__(
        self,
        strategy: NoiseRows | NoiseTaps,
        stddev: float,
        shapes: Sequence[Sequence[int]],
        fingerprint: str,
        seed: int | None = None,
        carriers: RunCarriers | None = None,
        exact_noise: bool = False,
        adapted: AdaptedNorm | None = None,
    ):
        self.fingerprint = fingerprint
        self.seeded = seed is not None
        self.restores = 0
        self.replayed = False
        self._warned = False
        self._distribution = tf.distribute.get_strategy()
        run_key = normals.fresh_key() if seed is None else normals.key_from_seed(seed)
        run_key = _distribution.from_chief(self._distribution, run_key.view(np.int64)).view(
            np.uint64
        )
        self.sampler_key = normals.fold_key(run_key, "sampler")
        self.carriers = carriers or RunCarriers([], strategy)
        self.carriers.start(normals.fold_key(run_key, "carriers"))
        self.adapted = adapted
        self.noise = noise_of(strategy, stddev, shapes, exact=exact_noise)
        self.noise.set_key(normals.fold_key(run_key, "noise"))
        if self.noise.num_steps * self.noise.num_replicas >= 2**STEP_BITS:
            raise ValueError(
                f"A run may have fewer than 2**{STEP_BITS} steps times replicas, because each pair "
                f"has its own seeds. Received: {self.noise.num_steps} steps on "
                f"{self.noise.num_replicas} replicas. Use larger batches."
            )
        with tf.init_scope(), self._distribution.scope():
            # A variable: a constant of a graph would be in every file that holds the graph.
            self._mask_key = tf.Variable(np.zeros(2, np.int64), trainable=False, name="mask_key")
        self._set_mask_key(normals.fold_key(run_key, "dropout"))
        self._data_digest: bytes | None = None

    def mask_seeds(self, step: tf.Tensor) -> MaskSeeds:
        """Returns the seeds of dropout masks in this step, on this replica.

        Call it in a replica context.

        Args:
            step: The step of the plan, a scalar integer.
        """
        step = tf.cast(tf.convert_to_tensor(step), tf.int64)
        place = step * self.noise.num_replicas + _distribution.replica_id()
        return MaskSeeds(self._mask_key.read_value(), place)

    def noisy_gradients(
        self, clipped: ClippedGradients, step: tf.Tensor, replica: int, scale: tf.Tensor
    ) -> list[tf.Tensor]:
        """Adds the noise of a step to clipped sums, and rebuilds gradients from coordinates.

        Formal guarantees:
            What is returned is computed from noisy sums over all replicas, and is NaN if rows were
            mixed or (with adaptive clipping) the gradients were clipped at the norm of another
            step. The clip norm moves by what the noisy count says, and by nothing else.

        Args:
            clipped: The clipped gradients of this replica.
            step: The step.
            replica: The number of the replica.
            scale: A public factor of the result.

        Returns:
            A gradient for each variable.

        Raises:
            PrivacyError: If adaptive clipping did not know the clip norm of the step, or (only
                eagerly) knew that of another one.
        """
        self.carriers.check_sums(clipped.sums)
        usable = tf.logical_not(clipped.rows_mixed)
        if self.adapted is None:
            sums = self.noise.noisy_sums(clipped.sums, step, replica, scale, usable)
            return self.carriers.gradients(sums)
        if clipped.adaptation is None:
            raise PrivacyError(
                "With adaptive clipping, gradients must be clipped at the norm of the step: pass "
                "`current_norm=optimizer.current_norm()` to `clipped_gradients`. Received: "
                "gradients that were clipped without it"
            )
        current_norm, count = clipped.adaptation
        own = self.adapted.is_of(current_norm)
        if tf.executing_eagerly() and self.noise.num_replicas == 1 and not bool(own):
            raise PrivacyError(
                "The gradients must be clipped at the norm of this step. Received: "
                f"current_norm={float(current_norm):.6g}, which is now "
                f"{float(self.adapted.read()):.6g}. Call `optimizer.current_norm()` in "
                "each step."
            )
        *sums, noisy_count = self.noise.noisy_sums(
            [*clipped.sums, tf.reshape(count, COUNT_SHAPE)],
            step,
            replica,
            scale * self.adapted.scale(),
            usable & own,
        )
        self.adapted.update(noisy_count)
        return self.carriers.gradients(sums)

    def get_mask_key(self) -> np.ndarray:
        """Returns the secret key of dropout masks, shape (2,), uint64."""
        return self._mask_key.numpy().view(np.uint64)

    def _set_mask_key(self, key: np.ndarray) -> None:
        self._mask_key.assign(_distribution.from_chief(self._distribution, key.view(np.int64)))

    def accept_data(self, digest: bytes, seeded: bool) -> None:
        """Ties the run to the rows, their order and the sampler's key.

        Args:
            digest: What `PrivateBatches.digest` returned.
            seeded: Whether the batches were drawn from a fixed seed.

        Raises:
            PrivacyError: If an earlier step of the run saw other ones.
        """
        if self._data_digest is not None and self._data_digest != digest:
            raise PrivacyError(
                "The batches differ from those the run began with: other rows, weights of rows, "
                "or order of the rows, or another sampler key. An example is identified by its "
                "row number, so it could now take part in adjacent steps, which the statement does "
                "not cover. "
                "Pass the same data in the same order (no `shuffle` in a tf.data.Dataset, and no "
                "changes in place)."
            )
        self._data_digest = digest
        self.seeded = self.seeded or seeded

    def check_workers(self) -> None:
        """Refuses worker processes that are not at the same step of the same run.

        All of them must call it. A clip norm that is adapted becomes that of the chief, from which
        others differ by rounding.

        Raises:
            PrivacyError: In every process, if one has another plan, model, data or checkpoint.
        """
        if self.adapted is not None:
            self.adapted.take_from_chief()
        # The noise key is left out: the chief sends it. The data digest covers the sampler's key.
        own = [self.fingerprint, self._data_digest, self.noise.position, self.seeded]
        own += [self.sampler_key.tobytes(), self.restores, self.replayed]
        if not _distribution.same_everywhere(self._distribution, repr(own).encode()):
            raise PrivacyError(
                "The worker processes are not running the same job: data, plan, model, seed or "
                "restored checkpoint differ. Give each worker the same rows in the same order, and "
                "let all of them restore the same checkpoint, or none. Received at this worker: "
                f"step {self.noise.position} after {self.restores} restores"
            )

    def warn_of_secrets(self, replay: bool) -> None:
        """Warns once that what is about to be written must stay secret, and says why.

        Args:
            replay: Whether it includes the noise key.
        """
        if self._warned:
            return
        self._warned = True
        key = (
            ", and, with replay=True, the noise key, from which all noise of the run follows"
            if replay
            else "; not the noise key"
        )
        slots = self.noise.num_slots
        ring = (
            f"the last {slots} rows of its noise, which can be subtracted from released weights, "
        )
        warnings.warn(
            "What is saved holds secrets of a private run: the sampler's key, "
            f"{ring if slots else ''}and its step{key}. Keep the file as secret as the data; "
            "`keras_bandmf.export(model, path)` writes what may be released.",
            stacklevel=2,
        )

    def to_arrays(self, replay: bool = False) -> dict[str, np.ndarray]:
        """Returns the state. Keep it secret: the ring is part of the noise of released weights.

        Args:
            replay: Whether to include the keys of noise and masks, from which all noise of the run
                can be computed. They are left out once the last step is made; the ring is then
                zero.
        """
        finished = self.noise.position == self.noise.num_steps
        keeps_key = replay and not finished
        none = np.zeros(0, np.int64)
        ring = self.noise.get_ring()
        return {
            "format": np.array(_FORMAT, np.int32),
            "fingerprint": np.frombuffer(self.fingerprint.encode(), np.uint8),
            "sampler_key": self.sampler_key.view(np.int64),
            "noise_key": self.noise.get_key().view(np.int64) if keeps_key else none,
            "mask_key": self.get_mask_key().view(np.int64) if keeps_key else none,
            # No later row needs what is in the ring of a finished run.
            "noise_ring": np.zeros_like(ring) if finished else ring,
            "position": np.array(self.noise.position, np.int64),
            "data_digest": np.frombuffer(self._data_digest or b"", np.uint8),
            "seeded": np.array(self.seeded, np.int32),
            "restores": np.array(self.restores, np.int32),
            "clip_norm": self.adapted.value if self.adapted else np.zeros((), np.float32),
            **self.carriers.to_arrays(),
        }

    def from_arrays(self, arrays: Mapping[str, np.ndarray], replay: bool) -> None:
        """Takes over what `to_arrays` returned in an earlier process.

        Args:
            arrays: The saved state.
            replay: Whether to keep the keys of noise and masks too, which repeats unreleased steps
                bit for bit.

        Raises:
            ValueError: If the state is incomplete, damaged, or of another run.
        """
        values = checked_fields(arrays)
        saved = values["fingerprint"].tobytes().decode(errors="replace")
        if saved != self.fingerprint:
            raise ValueError(
                "The checkpoint belongs to another run: plan, clip norm, inner optimizer or the "
                "shapes of the trainable variables differ. Continuing it here would void the "
                f"privacy guarantee. Expected fingerprint: {self.fingerprint}. Received: {saved}"
            )
        position = int(values["position"])
        if not 0 <= position <= self.noise.num_steps:
            raise ValueError(
                f"`position` in the checkpoint must be from 0 to {self.noise.num_steps}. "
                f"Received: {position}. The file is damaged."
            )
        finished = position == self.noise.num_steps
        keys = [values["noise_key"], values["mask_key"]]
        if replay and any(key.shape != (2,) for key in keys) and not finished:
            raise ValueError(
                "The checkpoint was saved without the noise key, so replay=True cannot repeat its "
                "noise. Restore it with replay=False; the optimizer that saves must be made with "
                "replay=True."
            )
        self.carriers.from_arrays(arrays)
        if self.adapted is not None:
            self.adapted.value = values["clip_norm"]
        self.noise.set_ring(values["noise_ring"], position)
        self.sampler_key = values["sampler_key"].view(np.uint64).copy()
        replayed = replay and not finished
        noise_key, mask_key = (
            [key.view(np.uint64) for key in keys]
            if replayed
            else [normals.fresh_key(), normals.fresh_key()]
        )
        self.noise.set_key(noise_key)
        self._set_mask_key(mask_key)
        self._data_digest = values["data_digest"].tobytes() or None
        self.seeded = bool(values["seeded"])
        self.restores = int(values["restores"]) + 1
        self.replayed = replayed


def state_of_no_run() -> dict[str, np.ndarray]:
    """Returns what a checkpoint holds of an optimizer whose run has not begun: names and types."""
    empty = {"history": np.zeros(0, np.uint8)}
    for name, (dtype, shape) in _FIELDS.items():
        empty[name] = np.zeros(0 if shape is None else shape, dtype)
    return empty


def is_of_no_run(arrays: Mapping[str, np.ndarray]) -> bool:
    """Returns whether a checkpoint was written before the run began.

    Args:
        arrays: What it holds of the optimizer.
    """
    empty = state_of_no_run()
    return arrays.keys() == empty.keys() and all(
        np.array_equal(arrays[name], value) for name, value in empty.items()
    )


def checked_fields(arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Returns what a checkpoint holds of a run.

    Args:
        arrays: What it holds of the optimizer.

    Raises:
        ValueError: If it is that of another optimizer, or damaged.
    """
    # First, because other formats have other fields.
    version = np.asarray(arrays.get("format", _FORMAT))
    if not np.array_equal(version, _FORMAT):
        raise ValueError(
            f"The optimizer state must be of format {_FORMAT}. Received: "
            f"format={version}. Use the version of keras_bandmf that wrote it."
        )
    missing = [name for name in _FIELDS if name not in arrays]
    if missing:
        raise ValueError(
            "The checkpoint holds no state of BandMFOptimizer, or only a part of it: its weights "
            "were saved with another optimizer. To begin a run with such weights, load them into "
            "a new model before `compile`: first `model.load_weights(path)`, then "
            "`model.compile(optimizer=BandMFOptimizer(...), ...)`. "
            f"Missing: {', '.join(missing)}. Received: {sorted(arrays)}."
        )
    values = {name: np.asarray(arrays[name]) for name in _FIELDS}
    for name, (dtype, shape) in _FIELDS.items():
        value = values[name]
        if value.dtype != dtype or (shape is not None and value.shape != shape):
            raise ValueError(
                f"`{name}` in the checkpoint must be of dtype {np.dtype(dtype).name}"
                f"{'' if shape is None else f' and shape {shape}'}. Received: {value.dtype}, "
                f"{value.shape}. The file is damaged."
            )
    return values
