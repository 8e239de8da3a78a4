"""The number of bands with the lowest expected RMSE, from public values only."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence

from keras_bandmf._checks import checked_int
from keras_bandmf._html import columns
from keras_bandmf._printed import rounded_down, rounded_up
from keras_bandmf.accounting.accountant import COARSE_ACCURACY, calibrate_noise
from keras_bandmf.noise.shards import ShardLayout
from keras_bandmf.planning.arguments import KnownStrategy
from keras_bandmf.sampling.laws import SamplingName
from keras_bandmf.sampling.schedule import Schedule

# The noise keeps num_bands - 1 copies of the model in float32.
DEFAULT_MAX_BANDS = 128
_COLUMNS = ("bands", "sampling", "noise multiplier", "expected RMSE", "/ DP-SGD")


@dataclasses.dataclass(frozen=True)
class BandCandidate:
    """What a number of bands would give under a sampling law.

    Attributes:
        sampling: "cyclic_poisson" or "fixed_order".
        num_bands: b.
        noise_multiplier: The sigma that meets the target, calibrated coarsely: some tenths of a
            percent above what is needed.
        expected_rmse: sigma * S * sqrt(mean error) / expected participations, in clip norms.
        strategy: The strategy of b bands.
    """

    sampling: SamplingName
    num_bands: int
    noise_multiplier: float
    expected_rmse: float
    strategy: KnownStrategy = dataclasses.field(compare=False, repr=False)


@dataclasses.dataclass(frozen=True)
class BandChoice:
    """The numbers of bands that were compared; all of them meet the same (epsilon, delta).

    `compare_bands` makes it. One band is always among the candidates, for every sampling law.
    Printed, it is a table: the best row is starred, and the last column is the expected RMSE
    relative to that of DP-SGD.

    Attributes:
        candidates: The candidates, by sampling law and ascending number of bands.
        limited_by: The largest number of bands that was to be considered, if the best candidate
            stands there and more might be better; else None.

    Example:
        >>> import keras_bandmf as bandmf
        >>> choice = bandmf.compare_bands(
        ...     num_examples=20_000, batch_size=100, epochs=2, epsilon=2.0, delta=1e-6,
        ...     num_bands=[2, 4],
        ... )
        >>> choice.best.num_bands, choice.dp_sgd.num_bands
        (4, 1)
        >>> choice.best.expected_rmse < choice.dp_sgd.expected_rmse
        True
        >>> list(choice.curves)
        ['cyclic_poisson']
    """

    candidates: tuple[BandCandidate, ...]
    limited_by: int | None = None

    @property
    def best(self) -> BandCandidate:
        """The candidate of lowest expected RMSE; of equals the one with the fewest bands."""
        return min(self.candidates, key=lambda c: (c.expected_rmse, c.num_bands))

    @property
    def dp_sgd(self) -> BandCandidate:
        """The candidate with one band: DP-SGD, with Poisson sampling if that was compared."""
        return self.candidates[0]

    @property
    def curves(self) -> dict[SamplingName, BandChoice]:
        """The candidates of each sampling law by themselves."""
        samplings = dict.fromkeys(row.sampling for row in self.candidates)
        return {
            name: BandChoice(tuple(row for row in self.candidates if row.sampling == name))
            for name in samplings
        }

    def of_bands(self, num_bands: int) -> BandChoice:
        """Returns only the candidates with this number of bands.

        Args:
            num_bands: b.

        Returns:
            A `BandChoice`; it has no candidates if the number was not compared.
        """
        return BandChoice(tuple(row for row in self.candidates if row.num_bands == num_bands))

    def __str__(self) -> str:
        """A table; the best row is starred, and the last column is relative to `dp_sgd`."""
        form = "{:>8}  {:<14}  {:>16}  {:>13}  {:>8}"
        lines = [form.format(*_COLUMNS)]
        for row, cells in zip(self.candidates, self._cells(), strict=True):
            line = form.format(*cells)
            lines.append("*" + line[1:] if row is self.best else line)
        return "\n".join([*lines, *self._notes()])

    def _repr_html_(self) -> str:
        best = self.candidates.index(self.best)
        return columns(_COLUMNS, self._cells(), best, self._notes())

    def _cells(self) -> list[list[str]]:
        return [
            [
                str(row.num_bands),
                row.sampling,
                rounded_down(row.noise_multiplier, 6),
                rounded_up(row.expected_rmse, 5),
                rounded_up(row.expected_rmse / self.dp_sgd.expected_rmse, 4),
            ]
            for row in self.candidates
        ]

    def _notes(self) -> list[str]:
        if self.limited_by is None:
            return []
        limit = f"The limit of {self.limited_by} bands is what ended the search"
        return [f"{limit}: more may be better (max_bands)."]


def max_bands_for_memory(num_parameters: int, memory_bytes: int, num_replicas: int = 1) -> int:
    """Returns the largest number of bands whose noise state fits in `memory_bytes`.

    Pass the result as `max_bands` to `TrainingPlan.calibrate` or `compare_bands`. The noise keeps
    num_bands - 1 earlier rows in float32, and each replica keeps its share of them. What does not
    grow with the model, such as the coefficients of a `BandedStrategy`, is not counted.

    Args:
        num_parameters: The number of trainable parameters of the model.
        memory_bytes: The memory that each replica can spare for the noise, in bytes.
        num_replicas: The number of replicas of the `tf.distribute` distribution.

    Returns:
        The number of bands, at least 1: DP-SGD keeps nothing.

    Raises:
        TypeError: An argument is not an integer.
        ValueError: An argument is out of range.

    Example:
        >>> import keras_bandmf as bandmf
        >>> bandmf.max_bands_for_memory(num_parameters=1_000_000, memory_bytes=64_000_000)
        16
    """
    shape = (checked_int("num_parameters", num_parameters),)
    memory_bytes = checked_int("memory_bytes", memory_bytes, minimum=0)
    layout = ShardLayout([shape], checked_int("num_replicas", num_replicas))
    return 1 + memory_bytes // (4 * layout.shard_size)


def expected_rmse(schedule: Schedule, noise_multiplier: float, mean_error: float) -> float:
    """Returns sigma * S * sqrt(mean error) / expected participations, in units of the clip norm.

    Args:
        schedule: The schedule of the run.
        noise_multiplier: sigma.
        mean_error: The mean of e_i over the steps, of the strategy scaled to column norm 1.

    Returns:
        The root mean square, over steps and coordinates, of the noise in the running sum of
        gradients, divided by the participations of an example. Under a workload other than prefix
        sums it is the noise in the weights, times num_steps / num_examples, and its unit is the
        clip norm times the learning rate. Ratios under one workload have the same meaning in both
        cases.
    """
    scale = noise_multiplier * schedule.sensitivity
    return scale * math.sqrt(mean_error) / schedule.expected_participations


def choose_bands(
    schedule: Schedule,
    epsilon: float,
    delta: float,
    make_strategy: Callable[[int], KnownStrategy],
    *,
    num_bands: int | Sequence[int] | None = None,
    max_bands: int = DEFAULT_MAX_BANDS,
) -> BandChoice:
    """Compares numbers of bands at one (epsilon, delta).

    Cyclic Poisson: powers of two upwards until the RMSE has risen twice (the curve has one
    valley: more bands cancel more noise, but sample at a higher rate), then the half-way points
    on both sides of the best. Fixed order: sigma does not depend on the bands and every further
    band lowers the error, so powers of two and the cap are compared only for the table.

    Formal guarantees: looks at no data, so the choice costs no privacy. The noise multipliers are
    for comparison; what is run must be calibrated finely.

    Args:
        schedule: The schedule of the run; its own number of bands is ignored.
        epsilon: The target.
        delta: In (0, 1).
        make_strategy: Function from b to a strategy of b bands.
        num_bands: Compares only this number, or these, with 1; None looks for the best.
        max_bands: The cap; the memory of the noise grows with the bands.

    Returns:
        The candidates; `.best` is the choice.

    Raises:
        TypeError: A number has the wrong type.
        ValueError: A number is out of range.
    """
    max_bands = checked_int("max_bands", max_bands)
    changes_noise = schedule.law.noise_depends_on_bands
    found: dict[int, BandCandidate] = {}

    def noise_of(run: Schedule) -> float:
        if found and not changes_noise:
            return next(iter(found.values())).noise_multiplier
        # Neighbors in the sweep have similar noise: start from the nearest one known.
        near = min(found.values(), key=lambda c: abs(c.num_bands - run.num_bands), default=None)
        guess = None if near is None else near.noise_multiplier
        return calibrate_noise(run, epsilon, delta, accuracy=COARSE_ACCURACY, guess=guess)

    def rmse(bands: int) -> float:
        if bands not in found:
            run = dataclasses.replace(schedule, num_bands=bands)
            sigma = noise_of(run)
            strategy = make_strategy(bands)
            value = expected_rmse(run, sigma, strategy.loss("mean"))
            found[bands] = BandCandidate(schedule.sampling, bands, sigma, value, strategy)
        return found[bands].expected_rmse

    rmse(1)
    if num_bands is not None:
        for bands in num_bands if isinstance(num_bands, Sequence) else (num_bands,):
            rmse(bands)
    elif changes_noise:
        _descend(rmse, _grid(schedule, max_bands), schedule.num_steps)
    else:
        for bands in _grid(schedule, max_bands):
            rmse(bands)
    choice = BandChoice(tuple(found[bands] for bands in sorted(found)))
    limited = num_bands is None and changes_noise and choice.best.num_bands == max(found)
    most = min(schedule.law.max_bands(schedule), schedule.num_steps)
    if limited and 1 < max_bands < most:
        return dataclasses.replace(choice, limited_by=max_bands)
    return choice


def _grid(schedule: Schedule, max_bands: int) -> list[int]:
    """Returns the candidates: powers of two and the cap, none with a round it barely uses."""
    most = min(schedule.law.max_bands(schedule), max_bands, schedule.num_steps)
    powers = {2**power for power in range(most.bit_length())} | {most}
    if schedule.law.noise_depends_on_bands:
        powers = {_without_waste(bands, schedule.num_steps) for bands in powers}
    return sorted(powers)


def _descend(rmse: Callable[[int], float], grid: list[int], num_steps: int) -> None:
    """Evaluates the grid upwards until past the valley, then the middles next to the lowest."""
    rises, previous = 0, math.inf
    tried: list[int] = []
    for bands in grid:
        value = rmse(bands)
        tried.append(bands)
        rises = rises + 1 if value >= previous else 0
        previous = value
        if rises == 2:
            break
    lowest = tried.index(min(tried, key=rmse))
    for left in (lowest - 1, lowest):
        if 0 <= left < len(tried) - 1:
            middle = round(math.sqrt(tried[left] * tried[left + 1]))
            rmse(_without_waste(middle, num_steps))


def _without_waste(bands: int, num_steps: int) -> int:
    """Returns the fewest bands with as many rounds: ceil(n / b) whole rounds are charged."""
    return math.ceil(num_steps / math.ceil(num_steps / bands))
