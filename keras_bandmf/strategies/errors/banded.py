"""The errors of any banded strategy, and their gradient, in O(n b^2), from covariances of blocks.

The noise rows u = C^-1 z and the outputs of the workload form a linear system driven by white
noise. Its state consists of the last b - 1 rows of u and the state of the workload. The squared
norm `e_i` of row i of A C^-1 is the variance of the workload's output at step i; a workload with
several outputs at each step has the sum of their variances. The covariance P of the state after a
block of m rows follows from that before it,

    P <- F P F' + B B',        e = diag(X P X' + Y Y'),

with matrices F, B, X, Y that depend on one block of C only. These are computed for many blocks at
once; only the two products with P are computed one after the other. The adjoint runs backwards at
the same cost. It keeps n x m numbers of each kind, never n x n.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

# Blocks are at least this long: with shorter ones, the time would go into calls of functions.
_MIN_BLOCK = 16
# How many numbers one array of a chunk of blocks has: the processor's cache holds a few of them.
_CHUNK_NUMBERS = 1 << 15


class WorkloadBlocks(NamedTuple):
    """A workload as a linear system with q states, cut into T blocks of m steps.

    For a block with inputs u (m) and the state s (q) before it, the outputs are
    `read_state s + read_input u`, and the state after it is `keep s + drive u`. A leading axis of 1
    instead of T means that all blocks are the same. The h outputs of a step stand together, and
    none depends on later inputs.

    Attributes:
      keep: `(T, q, q)` float64.
      drive: `(T, q, m)` float64.
      read_state: `(T, m h, q)` float64.
      read_input: `(T, m h, m)` float64.
    """

    keep: np.ndarray
    drive: np.ndarray
    read_state: np.ndarray
    read_input: np.ndarray

    @property
    def outputs(self) -> int:
        """The number of outputs h of each step."""
        _, rows, m = self.read_input.shape
        return rows // m


def block_size(num_bands: int) -> int:
    """Returns the number of steps m in a block: at least the memory of the noise, b - 1."""
    return max(_MIN_BLOCK, num_bands - 1)


def maps_of(workload: WorkloadBlocks, memory: int) -> np.ndarray:
    """Returns what maps the noise rows of a block to the state after it and to its outputs.

    Args:
      workload: A in T blocks of m steps, with q states.
      memory: p = b - 1, the noise rows that the state keeps.

    Returns:
      `(T, p + q + m h, m)` float64, where h is the number of outputs of each step.
    """
    count, _, m = workload.drive.shape
    newest = np.broadcast_to(np.eye(m)[m - memory :], (count, memory, m))
    return np.concatenate([newest, workload.drive, workload.read_input], axis=1)


def unit_response(workload: WorkloadBlocks, num_steps: int, first: int) -> np.ndarray:
    """Returns the outputs of a workload after a unit input at the first step of a block.

    Args:
      workload: A in blocks of m steps, with h outputs at each.
      num_steps: n.
      first: the block of the input.

    Returns:
      `(n - first m, h)` float64, from the step of the input on.
    """
    block = workload.read_input.shape[2]
    parts = [workload.read_input[first % len(workload.read_input), :, 0]]
    state = workload.drive[first % len(workload.drive), :, 0]
    for t in range(first + 1, -(-num_steps // block)):
        parts.append(workload.read_state[t % len(workload.read_state)] @ state)
        state = workload.keep[t % len(workload.keep)] @ state
    rows = np.concatenate(parts).reshape(-1, workload.outputs)
    return rows[: num_steps - first * block]


class BandedErrors:
    """The squared row norms of `A C^-1` as a function of C, with working memory for one C.

    Let p = b - 1 and q be the number of states of the workload. The forward pass keeps three
    matrices of each block for the adjoint, about 8 n m numbers in all. The columns of the first two
    stand for the p noise rows before the block, the q states before it, and its m noises z.

     * `solved` gives the noise rows of the block: `L^-1 (-U, 0, I)`, if (U, L) are its rows of C.
     * `mapped` gives the state after the block (p + q) and its outputs (m, or m h if each step has
       h of them): [[F, B], [X, Y]].
     * `before` is the covariance of the state before the block.

    Args:
      num_steps: n.
      num_bands: b, at most n.
      workload: A in blocks of `block_size(b)` steps, at least n steps in all.
    """

    def __init__(self, num_steps: int, num_bands: int, workload: WorkloadBlocks):
        self._shape = (num_steps, num_bands)
        self._memory = num_bands - 1
        self._block = m = block_size(num_bands)
        self._blocks = blocks = -(-num_steps // m)
        self._states = states = self._memory + workload.keep.shape[1]
        self._outputs = workload.outputs
        self._chunk = max(1, _CHUNK_NUMBERS // (m * m * self._outputs))
        self._workload = workload
        self._maps = maps_of(workload, self._memory)
        # The columns of C, after b - 1 columns of zeros that stand before the first step. Those
        # after the last step are of the identity; nothing depends on them.
        self._columns = np.zeros((self._memory + blocks * m, num_bands))
        self._columns[:, 0] = 1.0
        self._columns[: self._memory] = 0.0
        self._solved = np.zeros((blocks, m, states + m))
        self._mapped = np.zeros((blocks, states + m * self._outputs, states + m))
        self._before = np.zeros((blocks + 1, states, states))

    def evaluate(self, columns: np.ndarray) -> np.ndarray:
        """Returns the errors, and keeps what `gradient` needs.

        Args:
          columns: `(n, b)` float64. Row j is column j of C from its diagonal down. The diagonal is
            not zero. Entries that would lie below row n - 1 of C have no effect.

        Returns:
          `(n,)` float64, not finite where C^-1 overflows.
        """
        self._columns[self._memory : self._memory + len(columns)] = columns
        errors = np.empty((self._blocks, self._block))
        with np.errstate(over="ignore", invalid="ignore", divide="ignore"):
            for chunk in self._chunks():
                self._solve(chunk)
                errors[chunk] = self._propagate(chunk)
        return errors.reshape(-1)[: len(columns)]

    def gradient(self, weights: np.ndarray) -> np.ndarray:
        """Returns the gradient of `weights @ errors` with respect to the columns last evaluated.

        Args:
          weights: `(n,)` float64.

        Returns:
          `(n, b)` float64.
        """
        n = len(weights)
        by_block = np.zeros((self._blocks, self._block))
        by_block.reshape(-1)[:n] = weights
        gradient = np.zeros_like(self._columns)
        after = np.zeros((self._states, self._states))
        with np.errstate(over="ignore", invalid="ignore"):
            for chunk in reversed(self._chunks()):
                d_rows, after = self._adjoint(chunk, by_block[chunk], after)
                _scatter_rows(d_rows, gradient, chunk.start * self._block)
        return gradient[self._memory : self._memory + n]

    def _chunks(self) -> list[slice]:
        starts = range(0, self._blocks, self._chunk)
        return [slice(s, min(s + self._chunk, self._blocks)) for s in starts]

    def _solve(self, chunk: slice) -> None:
        """Fills `solved` and `mapped`, which depend on no other block."""
        p, s, m = self._memory, self._states, self._block
        rows = _gather_rows(self._columns, chunk.start * m, chunk.stop - chunk.start, m)
        solved, mapped = self._solved[chunk], self._mapped[chunk]
        inverse = _lower_inverse(rows[:, :, p:])
        solved[:, :, s:] = inverse
        np.matmul(-inverse, rows[:, :, :p], out=solved[:, :, :p])
        np.matmul(_part(self._maps, chunk), solved, out=mapped)
        mapped[:, p:s, p:s] = _part(self._workload.keep, chunk)
        mapped[:, s:, p:s] = _part(self._workload.read_state, chunk)

    def _propagate(self, chunk: slice) -> np.ndarray:
        """Fills `before` block by block, and returns the errors, `(T, m)`."""
        s = self._states
        mapped = self._mapped[chunk]
        steps = mapped[:, :s, :s]
        fresh = mapped[:, :s, s:]
        # A copy, because NumPy uses a slower routine for the product of an array with itself.
        fresh = np.matmul(fresh, fresh.transpose(0, 2, 1).copy())
        before = self._before[chunk.start : chunk.stop + 1]
        product = np.empty((s, s))
        for step, add, old, new in zip(steps, fresh, before[:-1], before[1:], strict=True):
            np.dot(np.dot(step, old, out=product), step.T, out=new)
            new += add
        outputs, white = mapped[:, s:, :s], mapped[:, s:, s:]
        spread = np.matmul(outputs, before[:-1])
        variances = np.einsum("tij,tij->ti", spread, outputs)
        variances += np.einsum("tij,tij->ti", white, white)
        return variances.reshape(len(mapped), self._block, self._outputs).sum(axis=2)

    def _adjoint(
        self, chunk: slice, weights: np.ndarray, after: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """Returns the adjoints of the rows of a chunk and of the covariance before it."""
        p, s = self._memory, self._states
        solved, mapped, before = self._solved[chunk], self._mapped[chunk], self._before[chunk]
        weights = 2.0 * np.repeat(weights, self._outputs, axis=1)[:, :, None]
        steps, outputs = mapped[:, :s, :s], mapped[:, s:, :s]
        direct = np.matmul(outputs.transpose(0, 2, 1), 0.5 * weights * outputs)
        adjoints = np.empty_like(steps)
        product = np.empty((s, s))
        for step, add, kept in zip(steps[::-1], direct[::-1], adjoints[::-1], strict=True):
            kept[...] = after
            after = np.dot(np.dot(step.T, kept, out=product), step)
            after += add
        # The derivative of the variance of [F, B; X, Y] (state, z) with respect to that matrix.
        d_mapped = np.concatenate([np.matmul(mapped[:, :, :s], before), mapped[:, :, s:]], axis=2)
        d_mapped[:, :s] = np.matmul(2.0 * adjoints, d_mapped[:, :s])
        d_mapped[:, s:] *= weights
        d_solved = np.matmul(_part(self._maps, chunk).transpose(0, 2, 1), d_mapped)
        # solved = (G, 0, L^-1) with G = -L^-1 U: dL = -L^-T dS S' and dU = -L^-T dG.
        d_solved = np.concatenate(
            [d_solved[:, :, :p], np.matmul(d_solved, solved.transpose(0, 2, 1))], axis=2
        )
        return np.matmul(-solved[:, :, s:].transpose(0, 2, 1), d_solved), after


def _part(array: np.ndarray, chunk: slice) -> np.ndarray:
    """Returns the blocks of a chunk. One block that stands for all stays one."""
    return array if len(array) == 1 else array[chunk]


def _gather_rows(padded: np.ndarray, first: int, blocks: int, m: int) -> np.ndarray:
    """Returns the rows of C in each block, `(T, m, p + m)`: p columns before it, then its own."""
    p = padded.shape[1] - 1
    rows = np.zeros((blocks, m, p + m))
    flat = rows.reshape(blocks, -1)
    for c in range(p + 1):  # The diagonal that is p - c below the main one.
        values = padded[first + c : first + c + blocks * m, p - c]
        flat[:, c :: p + m + 1][:, :m] = values.reshape(blocks, m)
    return rows


def _scatter_rows(rows: np.ndarray, padded: np.ndarray, first: int) -> None:
    """Applies the adjoint of `_gather_rows`: each entry of C is in the rows of one block."""
    blocks, m, width = rows.shape
    p = width - m
    flat = rows.reshape(blocks, -1)
    for c in range(p + 1):
        values = flat[:, c :: width + 1][:, :m]
        padded[first + c : first + c + blocks * m, p - c] = values.reshape(-1)


def _lower_inverse(lower: np.ndarray) -> np.ndarray:
    """Returns the inverses of `(T, m, m)` lower-triangular matrices, by halves."""
    inverse = np.zeros_like(lower)

    def fill(start: int, stop: int) -> None:
        if stop - start <= 4:
            for i in range(start, stop):
                pivot = 1.0 / lower[:, i, i]
                inverse[:, i, i] = pivot
                for j in range(start, i):
                    left, above = lower[:, i, j:i], inverse[:, j:i, j]
                    inverse[:, i, j] = -pivot * np.einsum("tk,tk->t", left, above)
            return
        half = (start + stop) // 2
        fill(start, half)
        fill(half, stop)
        first, second = slice(start, half), slice(half, stop)
        crossed = np.matmul(lower[:, second, first], inverse[:, first, first])
        inverse[:, second, first] = -np.matmul(inverse[:, second, second], crossed)

    fill(0, lower.shape[1])
    return inverse
