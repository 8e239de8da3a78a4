"""Which examples each step sees, as padded and masked batches."""

from keras_bandmf.sampling.batches import PrivateBatches

__all__ = ["PrivateBatches"]
