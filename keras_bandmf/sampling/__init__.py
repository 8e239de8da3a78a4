"""Which examples each step sees, as padded and masked batches."""

from keras_bandmf.sampling.batches import PrivateBatches
from keras_bandmf.sampling.streamed import StreamedBatches

__all__ = ["PrivateBatches", "StreamedBatches"]
