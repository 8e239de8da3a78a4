"""NoiseAwareAdam: Adam that takes the known variance of the noise off its second moment."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import keras
import numpy as np
import scipy.signal
import tensorflow as tf

from keras_bandmf._checks import checked_float
from keras_bandmf._keras_internals import adam_moments
from keras_bandmf.clipping import AdaptiveClipping, ClippingMode
from keras_bandmf.planning.plan import TrainingPlan
from keras_bandmf.rgp.run import RunCarriers
from keras_bandmf.strategies.noise_variances import noise_variances


@keras.saving.register_keras_serializable(package="keras_bandmf")
class NoiseAwareAdam(keras.optimizers.Adam):
    """Adam whose second moment is that of the gradients, without that of the noise (DP-AdamBC).

    Adam divides each step by the root of v, an average of squared gradients. Of noisy gradients
    g + z, v is about the average of g^2 plus that of the noise's variance phi. Where phi is by far
    the larger one, all coordinates are divided by the same number, and Adam is SGD with momentum.
    The variances are public: they follow from the plan, the clip norm and the batch size. With p_t,
    the average of `phi_1 .. phi_t` under the weights by which v averages, the divisor is here the
    root of

        max(v_t - p_t, variance_floor * p_t),

    and all else is Adam. With `weight_decay` it is AdamW. Use it as the inner optimizer of
    `BandMFOptimizer`, which tells it the variances: of step i, with row i of C^-1,

        phi_i = (standard deviation of Z / expected batch size)^2 * |row i of C^-1|^2.

    On the tasks of docs/results.md it brought a point of accuracy at best, and mostly nothing.

    Formal guarantees:
        It is a post-processing of the noisy gradients: beside them it uses public numbers only.
        With independent noise (one band), `v_t - p_t` has exactly the expectation of the average
        of g^2, because z_i is independent of all that happened before step i. With correlated
        noise it need not: `E[(g_i + z_i)^2] = E[g_i^2] + phi_i + 2 E[g_i z_i]`, and g_i depends
        on earlier noise through the weights. The last term is not known and left out. It is zero
        where the gradients do not depend on the weights, and small while the weights move
        little in as many steps as C has bands.

    `v_t` is an estimate: where gradients are small beside the noise, `v_t - p_t` is off by about
    `sqrt(2 / k) p_t`, where k is t at first, and later about `2 / (1 - beta_2)`. Below a
    floor of that size it says nothing, and differs from coordinate to coordinate by chance. The
    paper (Tang, Shpilevskiy and Lécuyer, arXiv 2312.14334) has an absolute floor gamma'. Here it
    is a share of the variance of the noise, so that it need not change with noise or batch size.

    Args:
        learning_rate: A number, a schedule, or a function without arguments. Begin with half of
            what suits Adam: a step may be up to `1 / sqrt(variance_floor)` times as long.
        beta_1: How much of the first moment is kept in a step, in [0, 1).
        beta_2: How much of the second moment is kept in a step, in [0, 1).
        epsilon: What Adam adds to the root, against division by zero where there is no noise.
        variance_floor: The smallest divisor, squared, as a share of the averaged variance of the
            noise; above 0. At 1 and above, few coordinates are told apart. Try 0.1 for embeddings.
        **kwargs: `weight_decay`, `use_ema`, `ema_momentum` and `name` of `keras.optimizers.Adam`.

    Raises:
        TypeError: If an argument is of the wrong type.
        ValueError: If an argument is out of range; if `amsgrad` is set, the maximum of estimates
            that are off by chance; or, when it is built, if variables are not of float32 or
            float64: in 16 bits the difference would be rounding errors.

    Example:
        >>> import keras_bandmf as bandmf
        >>> optimizer = bandmf.BandMFOptimizer(
        ...     bandmf.NoiseAwareAdam(0.01), epsilon=2.0, delta=1e-5, l2_norm_clip=1.0)
        >>> optimizer.inner_optimizer.variance_floor
        0.3
    """

    def __init__(
        self,
        learning_rate: Any = 0.001,
        beta_1: float = 0.9,
        beta_2: float = 0.999,
        epsilon: float = 1e-7,
        variance_floor: float = 0.3,
        **kwargs: Any,
    ):
        if kwargs.get("amsgrad"):
            raise ValueError(
                "`amsgrad` keeps the largest second moment so far, which of corrected ones is the "
                "one that is off most by chance. Received: amsgrad=True. Leave it out, or use "
                "`keras.optimizers.Adam`."
            )
        super().__init__(
            learning_rate,
            beta_1=checked_float("beta_1", beta_1, minimum=0.0, below=1.0),
            beta_2=checked_float("beta_2", beta_2, minimum=0.0, below=1.0),
            epsilon=checked_float("epsilon", epsilon, minimum=0.0),
            **kwargs,
        )
        self._variance_floor = checked_float("variance_floor", variance_floor, above=0.0)
        self._averaged_variances: tf.Tensor | None = None

    @property
    def variance_floor(self) -> float:
        """The smallest corrected second moment, as a share of the variance of the noise."""
        return self._variance_floor

    def set_noise(self, variances: np.ndarray) -> None:
        """Takes the variances of the noise. `BandMFOptimizer` calls it when it is built.

        Args:
            variances: `(n,)`: of one coordinate of the gradients of each step, as they are applied.

        Raises:
            ValueError: If they are not finite numbers of at least 0.
        """
        variances = np.asarray(variances, np.float64)
        if variances.ndim != 1 or not variances.size or not np.all(np.isfinite(variances)):
            raise ValueError(
                "Expected `variances` to be a finite number for each step. Received: "
                f"variances={variances!r}. Use a strategy whose inverse does not grow."
            )
        if np.any(variances < 0.0):
            raise ValueError(
                "Expected `variances` to be at least 0. Received: a smallest one of "
                f"{variances.min()}. Pass squares of standard deviations."
            )
        # As v is averaged, from zero: Keras's correction of that acts on both.
        averaged = scipy.signal.lfilter([1.0 - self.beta_2], [1.0, -self.beta_2], variances)
        with tf.init_scope():
            self._averaged_variances = tf.constant(averaged, tf.float32)

    def build(self, variables: Sequence[keras.Variable]) -> None:
        """Makes the moments.

        Args:
            variables: The trainable variables of the model.

        Raises:
            ValueError: If they are not of float32 or float64.
        """
        short = {str(v.dtype) for v in variables} - {"float32", "float64"}
        if short:
            raise ValueError(
                "NoiseAwareAdam needs variables of float32 or float64, since the difference of two "
                "16-bit numbers is mostly rounding. Received: variables of "
                f"{', '.join(sorted(short))}. Use the dtype policy 'mixed_bfloat16' in place of "
                "'bfloat16', or `keras.optimizers.Adam`."
            )
        super().build(variables)

    def update_step(
        self, gradient: tf.Tensor, variable: keras.Variable, learning_rate: tf.Tensor
    ) -> None:
        """Updates one variable with the noisy gradient, which is that of all replicas.

        Args:
            gradient: The noisy gradient.
            variable: The variable.
            learning_rate: The learning rate of this step.

        Raises:
            ValueError: If the noise is not known: there is no `BandMFOptimizer` around it.
        """
        if self._averaged_variances is None:
            raise ValueError(
                "NoiseAwareAdam does not know the noise. Received: a gradient before the noise. "
                "Use it inside: `BandMFOptimizer(NoiseAwareAdam(...), plan)`."
            )
        dtype = variable.dtype
        step = tf.convert_to_tensor(self.iterations)
        # A step beyond the plan has a gradient of NaN, and so a NaN update.
        last = tf.cast(len(self._averaged_variances) - 1, step.dtype)
        noise = tf.cast(tf.gather(self._averaged_variances, tf.minimum(step, last)), dtype)
        count = tf.cast(step + 1, dtype)
        bias_1 = 1.0 - tf.pow(tf.cast(self.beta_1, dtype), count)
        bias_2 = 1.0 - tf.pow(tf.cast(self.beta_2, dtype), count)
        rate = tf.cast(learning_rate, dtype) * tf.sqrt(bias_2) / bias_1
        first, second = adam_moments(self, variable)
        self.assign_add(first, (gradient - first) * (1.0 - self.beta_1))
        self.assign_add(second, (tf.square(gradient) - second) * (1.0 - self.beta_2))
        corrected = tf.maximum(second - noise, self.variance_floor * noise)
        self.assign_sub(variable, first * rate / (tf.sqrt(corrected) + self.epsilon))

    def get_config(self) -> dict[str, Any]:
        """Returns the config. It does not contain the noise, which is that of the run."""
        config = super().get_config()
        del config["amsgrad"]
        return {**config, "variance_floor": self.variance_floor}


def refuse_unknown_noise(optimizer: keras.optimizers.Optimizer, clipping: ClippingMode) -> None:
    """Refuses an inner optimizer that must know the noise where its size is not known in advance.

    Args:
        optimizer: The inner optimizer.
        clipping: The clipping mode.

    Raises:
        ValueError: For a `NoiseAwareAdam` with adaptive clipping, which scales the noise with the
            clip norm.
    """
    if isinstance(optimizer, NoiseAwareAdam) and isinstance(clipping, AdaptiveClipping):
        raise ValueError(
            "NoiseAwareAdam needs to know the variance of the noise, and adaptive clipping changes "
            f"it in every step. Received: clipping={clipping}. Use `keras.optimizers.Adam`, or "
            "another mode of clipping."
        )


def tell_noise(
    optimizer: keras.optimizers.Optimizer,
    plan: TrainingPlan,
    stddev: float,
    carriers: RunCarriers,
) -> None:
    """Tells an inner optimizer what noise its gradients will have, if it asks for that.

    Args:
        optimizer: The inner optimizer. Only a `NoiseAwareAdam` is told.
        plan: The plan of the run.
        stddev: The standard deviation of `Z` in the sum of clipped gradients.
        carriers: The carriers of the run.

    Raises:
        ValueError: If gradients are rebuilt from low-rank carriers: their noise has no variance
            that is the same for all coordinates of a step.
    """
    if not isinstance(optimizer, NoiseAwareAdam):
        return
    if carriers.description:
        raise ValueError(
            "NoiseAwareAdam needs to know the variance of the noise in each coordinate, and in "
            f"gradients that are rebuilt from carriers it is not known. Received: {carriers}. Use "
            "`keras.optimizers.Adam`, or take the carriers off with `merge_rgp`."
        )
    scale = stddev / plan.schedule.expected_batch_size
    optimizer.set_noise(scale**2 * noise_variances(plan.strategy))
