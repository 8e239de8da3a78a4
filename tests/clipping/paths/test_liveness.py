"""The memory of a trace: chains, branches, views, sums, and control dependencies."""

import pytest
import tensorflow as tf

from keras_bandmf.clipping.paths.liveness import Memory, Moment, memory_of

PRIME = 101
ROWS = 2 * PRIME
# The bytes of one column of rows.
COLUMN = 4 * ROWS


def traced(function, *shapes):
    specs = [tf.TensorSpec(shape) for shape in shapes]
    graph = tf.function(function, autograph=False).get_concrete_function(*specs).graph
    return memory_of(graph, ROWS, PRIME)


def test_what_is_used_up_is_freed():
    """At most two of the tensors of a chain are alive, however long it is."""

    def chain(x):
        for _ in range(6):
            x = tf.sin(x)
        return x

    assert traced(chain, (ROWS, 10)).peak(ROWS) == 2 * 10 * COLUMN


def test_what_is_used_later_is_kept():
    """The tensors of a forward pass wait for the backward pass."""

    def there_and_back(x):
        kept = []
        for _ in range(6):
            x = tf.sin(x)
            kept.append(x)
        for one in reversed(kept):
            x = x * one
        return x

    # Six sines, the last of which is an operand twice, and the first product.
    assert traced(there_and_back, (ROWS, 10)).peak(ROWS) == 7 * 10 * COLUMN


@pytest.mark.parametrize(("ordered", "alive"), [(False, 9), (True, 2)])
def test_control_dependencies_keep_copies_apart(ordered, alive):
    """Without them the executor may make all copies at once, in whatever order Python did."""

    def sums(x):
        found = []
        for i in range(9):
            with tf.control_dependencies(found[-1:] if ordered else []):
                found.append(tf.reduce_sum(tf.sin(x * (i + 1.0)), axis=0))
        return found

    peak = traced(sums, (ROWS, 10)).peak(ROWS)
    # The input and the copies; the sums themselves are a few bytes.
    assert (1 + alive) * 10 * COLUMN <= peak < (1.1 + alive) * 10 * COLUMN


def test_lists_that_loops_fill_and_read_are_counted():
    """A loop hides what it keeps of its steps for another one, as recurrent layers do."""

    def there_and_back(x):
        kept = tf.TensorArray(tf.float32, 6, element_shape=x.shape, clear_after_read=False)

        def there(i, kept, x):
            return i + 1, kept.write(i, x), tf.sin(x)

        def back(i, x):
            return i + 1, x * kept.read(5 - i)

        _, kept, x = tf.while_loop(lambda i, *_: i < 6, there, (0, kept, x))
        return tf.while_loop(lambda i, *_: i < 6, back, (0, x))[1]

    # What is kept, what goes into a loop, and what comes out; integers besides.
    peak = traced(there_and_back, (ROWS, 10)).peak(ROWS)
    assert 8 * 10 * COLUMN <= peak < 8 * 10 * COLUMN + 200


def test_a_list_of_a_tensor_is_a_copy():
    def total(x):
        rows = tf.TensorArray(tf.float32, 6, element_shape=x.shape[1:]).unstack(x)

        def add(i, y):
            return i + 1, y + rows.read(i)

        return tf.while_loop(lambda i, _: i < 6, add, (0, tf.zeros([ROWS, 1])))[1]

    # At the copy, and later the list beside the sum that goes in, and the one that comes out.
    peak = traced(total, (6, ROWS, 1)).peak(ROWS)
    assert 12 * COLUMN <= peak < 14 * COLUMN


def test_views_take_no_memory():
    def views(x):
        y = tf.reshape(tf.identity(x), [ROWS, 2, 5])[:7]
        return tf.squeeze(tf.expand_dims(y, 0), 0)

    assert traced(views, (ROWS, 10)).peak(ROWS) == 10 * COLUMN


def test_weights_and_rows_are_told_apart():
    def layer(x, kernel):
        return tf.matmul(x, tf.sin(kernel))

    memory = traced(layer, (ROWS, 10), (10, 30))
    assert memory.peak(0) == 2 * 4 * 10 * 30
    # When the product is made, the kernel itself is no longer needed.
    assert memory.peak(3 * ROWS) == 4 * 10 * 30 + 3 * 40 * COLUMN


def test_the_most_rows_are_those_that_fit():
    memory = Memory(10, (Moment(1000, 0), Moment(600, 50), Moment(0, 100)))
    for budget in (1, 99, 100, 101, 350, 5000):
        rows = memory.most_rows(budget)
        assert rows == 1 or memory.peak(rows) <= 1000 + budget
        assert memory.peak(rows + 1) > 1000 + budget
    assert Memory(10, (Moment(1000, 0),)).most_rows(1) == 10


def test_the_same_trace_gives_the_same_memory():
    """A run that is resumed must find the same number."""
    found = {traced(lambda x: tf.nn.softmax(x @ tf.ones([10, 3])), (ROWS, 10)) for _ in range(3)}
    assert len(found) == 1
