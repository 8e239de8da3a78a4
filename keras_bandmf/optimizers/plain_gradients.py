"""The methods of Keras optimizers that take plain gradients, which a private one refuses."""

from __future__ import annotations

from typing import Any, NoReturn

from keras_bandmf._checks import PrivacyError


class RefusesPlainGradients:
    """A base class whose methods refuse gradients that nobody clipped.

    It comes before that of Keras among the base classes.
    """

    def apply(self, grads: Any, trainable_variables: Any = None) -> NoReturn:
        """Always raises an error, because plain gradients were not clipped per example.

        Args:
            grads: Gradients, which are not looked at.
            trainable_variables: Variables, which are not looked at.

        Raises:
            PrivacyError: Always. Use `apply_clipped`.
        """
        raise PrivacyError(
            "BandMFOptimizer received plain gradients, which carry no privacy. The model is not "
            "private: call `keras_bandmf.privatize(model)` before `fit`, also after loading or "
            "cloning a model. In a loop of your own, call `keras_bandmf.clipped_gradients` and "
            "`optimizer.apply_clipped`."
        )

    def stateless_apply(
        self, optimizer_variables: Any, grads: Any, trainable_variables: Any
    ) -> NoReturn:
        """Always raises an error, as `apply` does.

        Args:
            optimizer_variables: Variables, which are not looked at.
            grads: Gradients, which are not looked at.
            trainable_variables: Variables, which are not looked at.

        Raises:
            PrivacyError: Always.
        """
        self.apply(grads, trainable_variables)
