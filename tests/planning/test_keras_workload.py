"""The workload of a Keras optimizer: against Keras itself, and what is refused."""

import keras
import numpy as np
import pytest

from keras_bandmf import workload_from_optimizer
from keras_bandmf.strategies import ToeplitzStrategy, Workload
from tests.plans import dense_workload

N = 9
SGD, SCHEDULES = keras.optimizers.SGD, keras.optimizers.schedules


class Halves(SCHEDULES.LearningRateSchedule):
    """Plain Python, which no tensor of many steps goes through."""

    def __call__(self, step):
        return 0.5 if int(step) < N // 2 else 0.25


class Constant(SCHEDULES.LearningRateSchedule):
    """Takes no notice of the step."""

    def __call__(self, step):
        return 0.3


def warm_up():
    return SCHEDULES.CosineDecay(0.0, N, warmup_target=0.5, warmup_steps=4)


MAKERS = {
    "rate": lambda: SGD(0.1),
    "momentum": lambda: SGD(0.1, momentum=0.9),
    "nesterov": lambda: SGD(0.1, momentum=0.9, nesterov=True),
    "nesterov without momentum": lambda: SGD(0.1, nesterov=True),
    "cosine": lambda: SGD(SCHEDULES.CosineDecay(0.5, N), momentum=0.8),
    "warm-up from zero": lambda: SGD(warm_up(), momentum=0.5, nesterov=True),
    "pieces": lambda: SGD(SCHEDULES.PiecewiseConstantDecay([2, 5], [1.0, 0.5, 0.1])),
    "restarts": lambda: SGD(SCHEDULES.CosineDecayRestarts(0.4, 4)),
    "decay": lambda: SGD(warm_up(), momentum=0.7, nesterov=True, weight_decay=0.3),
    "decay, no momentum": lambda: SGD(SCHEDULES.ExponentialDecay(0.9, 2, 0.5), weight_decay=0.5),
    "plain Python": lambda: SGD(Halves(), momentum=0.5),
    "constant schedule": lambda: SGD(Constant(), momentum=0.5),
}


@pytest.mark.parametrize("name", MAKERS)
def test_weights_respond_to_the_gradients_as_in_keras(name):
    # Weight j gets a unit gradient at step j alone: the trajectories are the columns of A.
    optimizer = MAKERS[name]()
    matrix = dense_workload(workload_from_optimizer(optimizer, N))
    weights = keras.Variable(np.zeros(N, np.float32))
    for i in range(N):
        optimizer.apply([keras.ops.eye(N)[i]], [weights])
        np.testing.assert_allclose(-weights.numpy(), matrix[i], rtol=0, atol=2e-6)


def test_the_schedule_starts_at_step_zero_however_far_the_optimizer_is():
    optimizer = MAKERS["cosine"]()
    fresh = workload_from_optimizer(optimizer, N)
    optimizer.iterations.assign(5)
    assert workload_from_optimizer(optimizer, N) == fresh
    assert int(optimizer.iterations.numpy()) == 5
    rates = [float(SCHEDULES.CosineDecay(0.5, N)(i)) for i in range(N)]
    np.testing.assert_allclose(fresh.learning_rates, rates, rtol=1e-6, atol=1e-8)


def test_a_constant_rate_stays_a_number():
    found = workload_from_optimizer(SGD(0.25, momentum=0.5, weight_decay=0.125), 10**6)
    assert found == Workload(10**6, 0.25, momentum=0.5, weight_decay=0.125)
    assert isinstance(found.learning_rates, float)


def test_curvatures_are_given_beside_the_optimizer():
    optimizer = SGD(SCHEDULES.CosineDecay(0.5, N), momentum=0.8, nesterov=True, weight_decay=0.1)
    flat = workload_from_optimizer(optimizer, N)
    found = workload_from_optimizer(
        optimizer, N, curvatures=[0.1, 2.0], curvature_weights=np.array([1.0, 3.0])
    )
    expected = {**flat.get_config(), "curvatures": [0.1, 2.0], "curvature_weights": [0.25, 0.75]}
    assert found.get_config() == expected
    assert workload_from_optimizer(optimizer, N, curvatures=[0.0]) == flat
    with pytest.raises(ValueError, match="`curvatures` to be at most .*Received: a curvature of 5"):
        workload_from_optimizer(optimizer, N, curvatures=[0.1, 5.0])
    with pytest.raises(ValueError, match="`curvatures` to be one of 'auto'. Received.*a list"):
        workload_from_optimizer(optimizer, N, curvatures="spread")
    with pytest.raises(ValueError, match="`curvature_weights`.*Received"):
        workload_from_optimizer(optimizer, N, curvatures=[0.1], curvature_weights=[1.0, 2.0])


@pytest.mark.parametrize("name", MAKERS)
@pytest.mark.parametrize("n", [2, 300])
def test_automatic_curvatures_depend_on_the_optimizer_alone(name, n):
    optimizer = MAKERS[name]()
    found = workload_from_optimizer(optimizer, n, curvatures="auto")
    flat = workload_from_optimizer(optimizer, n)
    assert found == workload_from_optimizer(optimizer, n, curvatures=found.curvatures)
    h = np.array(found.curvatures)
    assert len(h) == 4 and np.all(h > 0.0) and np.all(np.diff(h) >= 0.0)
    steps = (1.0 - flat.momentum) / (np.mean(flat.learning_rates) * h)
    assert steps[0] == pytest.approx(4 * n)
    assert np.all(steps >= 2.0 * (1 - 1e-12))
    assert len(set(found.curvature_weights)) == 1
    assert len(workload_from_optimizer(SGD(0.1), 1, curvatures="auto").curvatures) == 4


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_how_soon_sgd_undoes_noise_along_the_automatic_curvatures(momentum):
    # What is left after n steps of the noise of the first one, as a share of what it does to the
    # weights without curvature.
    n = 400
    found = workload_from_optimizer(SGD(0.1, momentum=momentum), n, curvatures="auto")
    left = []
    for h in found.curvatures:
        velocity, moved = 0.1, 0.1
        for _ in range(n - 1):
            velocity = momentum * velocity - 0.1 * h * moved
            moved += velocity
        left.append(abs(moved) * (1 - momentum) / 0.1)
    assert left[:2] == pytest.approx(np.exp([-0.25, -1.0]), rel=0.1)
    assert left[2] == pytest.approx(np.exp(-4.0), rel=0.5)  # momentum makes it faster
    assert left[3] < 1e-5


class OwnSGD(SGD):
    """Could update in any way."""


def excluding():
    optimizer = SGD(0.1, weight_decay=0.1)
    optimizer.exclude_from_weight_decay(var_names=["bias"])
    return optimizer


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (keras.optimizers.Adam, "class Adam"),
        (lambda: OwnSGD(0.1), "class OwnSGD"),
        (lambda: SGD(0.1, clipnorm=1.0), "clipnorm=1.0"),
        (lambda: SGD(0.1, clipvalue=1.0), "clipvalue=1.0"),
        (lambda: SGD(0.1, global_clipnorm=1.0), "global_clipnorm=1.0"),
        (lambda: SGD(0.1, use_ema=True), "use_ema=True"),
        (lambda: SGD(0.1, loss_scale_factor=2.0), "loss_scale_factor=2.0"),
        (lambda: SGD(0.1, gradient_accumulation_steps=2), "gradient_accumulation_steps=2"),
        (lambda: SGD(lambda: 0.1), "a function as its learning rate"),
        (excluding, "variables excluded from weight decay"),
    ],
)
def test_no_linear_workload(make, words):
    with pytest.raises(ValueError, match=f"{words}.*Leave `workload` out"):
        workload_from_optimizer(make(), N)


def test_excluding_from_no_weight_decay_changes_nothing():
    optimizer = SGD(0.5)
    optimizer.exclude_from_weight_decay(var_names=["bias"])
    assert workload_from_optimizer(optimizer, N) == Workload(N, 0.5)


def rates(*values):
    boundaries = list(range(len(values) - 1))
    return SGD(SCHEDULES.PiecewiseConstantDecay(boundaries, list(values)))


def test_bad_rates_and_bad_arguments():
    for optimizer in (rates(0.1, -0.1), rates(0.0, 0.0), rates(0.1, np.nan), SGD(0.0)):
        with pytest.raises(ValueError, match="`learning_rates` to be finite, not negative"):
            workload_from_optimizer(optimizer, N)
    with pytest.raises(ValueError, match="`momentum` to be below 1"):
        workload_from_optimizer(SGD(0.1, momentum=1.0), N)
    with pytest.raises(ValueError, match="`weight_decay` times the largest learning rate"):
        workload_from_optimizer(SGD(0.5, weight_decay=3.0), N)
    for optimizer in ("sgd", None, SCHEDULES.CosineDecay(0.1, N)):
        with pytest.raises(TypeError, match="Received: optimizer="):
            workload_from_optimizer(optimizer, N)
    with pytest.raises(TypeError, match="num_steps=9.0"):
        workload_from_optimizer(SGD(0.1), 9.0)
    with pytest.raises(ValueError, match="num_steps=0"):
        workload_from_optimizer(SGD(0.1), 0)


def test_for_adam_prefix_sums_are_a_better_workload_than_its_momentum():
    """Adam's correction of its start counts the first gradients fully: docs/choosing_a_plan.md."""
    n, bands = 100, 11
    # The second moment is frozen: it is nothing beside `epsilon`, which the rate makes up for.
    optimizer = keras.optimizers.Adam(1e8, beta_1=0.9, beta_2=0.0, epsilon=1e8)
    weights, rows = keras.Variable(np.zeros(n, np.float32)), []
    for i in range(n):
        optimizer.apply([keras.ops.eye(n)[i]], [weights])
        rows.append(-weights.numpy().astype(np.float64))
    rows = np.array(rows)
    np.testing.assert_allclose(rows[0], np.eye(n)[0], atol=1e-6)

    def error(strategy):
        return np.linalg.norm(rows @ np.linalg.inv(strategy.materialize()))

    prefix = error(ToeplitzStrategy.optimize(n, bands))
    momentum = error(ToeplitzStrategy.optimize(n, bands, workload=Workload(n, momentum=0.9)))
    assert 1.09 < momentum / prefix < 1.11
    assert prefix < 0.5 * error(ToeplitzStrategy.optimize(n, 1))
