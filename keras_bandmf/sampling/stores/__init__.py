"""Where the examples of a run are kept: in memory, in files, or in a source of rows."""

from keras_bandmf.sampling.stores.base import Store
from keras_bandmf.sampling.stores.choice import open_store
from keras_bandmf.sampling.stores.memory import MemoryStore
from keras_bandmf.sampling.stores.random_access import RandomAccessStore

__all__ = ["MemoryStore", "RandomAccessStore", "Store", "open_store"]
