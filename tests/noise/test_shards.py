"""The layout covers every element exactly once and does not depend on the replicas."""

import numpy as np
import pytest
import tensorflow as tf

from keras_bandmf.noise.normals import CHUNK
from keras_bandmf.noise.shards import ShardLayout

SHAPES = [(700, 3), (5,), (), (0, 4), (1500,), (2, 3, 4)]


@pytest.mark.parametrize("num_shards", [1, 2, 3, 7])
def test_shares_add_up_to_the_flat_vector(num_shards):
    layout = ShardLayout(SHAPES, num_shards)
    flat = np.arange(1, layout.num_shards * layout.shard_size + 1, dtype=np.float64)
    totals = [np.zeros(shape) for shape in SHAPES]
    counts = [np.zeros(shape) for shape in SHAPES]
    for shard, part in enumerate(np.split(flat, num_shards)):
        for index, share in enumerate(layout.split(tf.constant(part), shard)):
            if share is not None:
                assert share.shape == SHAPES[index]
                totals[index] += share.numpy()
                counts[index] += share.numpy() != 0
    joined = np.concatenate([total.ravel() for total in totals])
    np.testing.assert_array_equal(joined, flat[: layout.size])
    assert all((count == 1).all() for count in counts)


@pytest.mark.parametrize("num_shards", [1, 2, 5])
def test_gather_and_scatter_are_inverse_for_any_number_of_replicas(num_shards):
    rows = np.random.default_rng(0).normal(size=(3, ShardLayout(SHAPES).size))
    layout = ShardLayout(SHAPES, num_shards)
    parts = layout.scatter(rows)
    assert all(part.shape == (3, layout.shard_size) for part in parts)
    np.testing.assert_array_equal(layout.gather(parts), rows)


def test_shards_are_whole_chunks_and_follow_each_other():
    layout = ShardLayout([(10 * CHUNK + 1,)], 4)
    assert layout.chunks_per_shard == 3
    assert [layout.first_chunk(shard) for shard in range(4)] == [0, 3, 6, 9]


def test_more_replicas_than_chunks_leave_some_without_a_part():
    layout = ShardLayout([(3,)], 4)
    flat = tf.ones([layout.shard_size])
    assert [layout.split(flat, shard)[0] is None for shard in range(4)] == [False] + [True] * 3
