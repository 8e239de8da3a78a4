"""The parts of the chain of programs against dense NumPy."""

import numpy as np
import pytest
import tensorflow as tf

from keras_bandmf.accounting.amplification import proposals
from keras_bandmf.accounting.amplification.estimator import Estimator
from keras_bandmf.accounting.amplification.programs import Columns
from keras_bandmf.noise import normals
from keras_bandmf.sampling.patterns import AllocationInGroup, PoissonInGroup, Rounds

from . import reference


@pytest.fixture(params=[(7, 3), (6, 6), (5, 1), (12, 4)], ids=str)
def parts(request):
    """(programs, tables, C padded to whole rounds)."""
    steps, bands = request.param
    estimator = Estimator(
        reference.square_root_columns(steps, bands), PoissonInGroup(Rounds(steps, bands), 0.3)
    )
    rows = -(-steps // bands) * bands
    matrix = np.zeros((rows, rows))
    matrix[:steps, :steps] = reference.dense(estimator.columns)
    return estimator._programs, Columns.of(estimator.columns, rows), matrix


def drawn(programs):
    """(noise, uniform numbers that choose a group, the groups)."""
    random = np.random.default_rng(3)
    rounds = programs.law.rounds
    noise = random.normal(size=(rounds.most * rounds.num_bands, programs.chunk))
    uniforms = random.random(programs.chunk)
    return noise, uniforms, np.floor(uniforms * rounds.num_bands).astype(int)


def table(programs, scores):
    rounds = programs.law.rounds
    return scores.reshape(rounds.most, rounds.num_bands, -1)


def own(programs, scores, groups):
    return table(programs, scores)[:, groups, np.arange(len(groups))]


def test_scores_are_those_of_the_matrix(parts):
    programs, tables, matrix = parts
    noise, uniforms, groups = drawn(programs)
    found = programs._scores(tables.columns, tf.constant(noise))
    np.testing.assert_allclose(found, table(programs, matrix.T @ noise), atol=1e-12)
    group, scores = programs._own_scores(tables.owned, tf.constant(noise), tf.constant(uniforms))
    np.testing.assert_array_equal(group, groups)
    np.testing.assert_allclose(scores, own(programs, matrix.T @ noise, groups), atol=1e-12)


def test_noise_moves_along_the_columns_of_the_own_group_only(parts):
    programs, tables, matrix = parts
    noise, uniforms, groups = drawn(programs)
    change = np.random.default_rng(4).normal(size=(programs.law.rounds.most, programs.chunk))
    found = programs._moved(
        tables.owned,
        tf.constant(noise),
        tf.constant(groups, tf.int32),
        tf.constant(np.pad(change, [[1, 0], [0, 0]])),
    )
    places = np.zeros(table(programs, noise).shape)
    places[:, groups, np.arange(len(groups))] = change
    np.testing.assert_allclose(found, noise + matrix @ places.reshape(noise.shape), atol=1e-12)


def test_chunks_and_uses_have_words_of_their_own():
    law = PoissonInGroup(Rounds(12, 3), 0.3)
    estimator = Estimator(reference.square_root_columns(12, 3), law)
    programs = estimator._programs
    key = tf.constant(normals.key_from_seed(5).view(np.int64))
    numbers = [tf.constant(index, tf.int64) for index in range(3)]
    noise = [programs._normals(key, number)[0].numpy() for number in numbers]
    uniforms = [
        programs._uniforms(key, number, [1000], use).numpy() for number in numbers for use in (1, 2)
    ]
    for values in (noise, uniforms):
        several = np.array([value[:1000] for value in values])
        assert len(np.unique(several)) == several.size
        correlations = np.corrcoef(several) - np.eye(len(several))
        assert np.abs(correlations).max() < 0.15


def test_a_seed_decides_all_samples_whatever_the_threads():
    law = AllocationInGroup(Rounds(12, 3), 2)
    estimator = Estimator(reference.square_root_columns(12, 3), law)
    proposal, largest = proposals.best_tilt(law, 1.5, 1.0)
    found = [estimator.remove(1.5, 1.0, proposal, 100_000, seed, largest) for seed in (5, 5, 6)]
    for first, second in zip(found[0], found[1], strict=True):
        np.testing.assert_array_equal(first, second)
    assert found[0].mean[0] != found[2].mean[0]


def test_log_sums_are_those_of_the_samples():
    law = PoissonInGroup(Rounds(6, 2), 0.3)
    estimator = Estimator(reference.square_root_columns(6, 2), law)
    proposal, largest = proposals.best_tilt(law, 1.2, 0.5)
    found = estimator.remove(1.2, 0.5, proposal, 20_000, 5, largest)
    # To second order in a gamma far below 1 / B: -gamma sum(w) - gamma^2 sum(w^2) / 2 - ...
    squares = found.variance[0] * (found.samples - 1) + found.samples * found.mean[0] ** 2
    gamma = 0.9 / 64 / largest
    third = gamma**3 * found.largest[0] * squares
    expected = -gamma * found.samples * found.mean[0] - gamma**2 * squares / 2
    assert 0.0 <= expected - found.log_sums[3, 0] <= third
