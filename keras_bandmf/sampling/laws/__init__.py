"""The sampling laws, one file each: how examples are drawn, what that costs, and its words."""

from keras_bandmf.sampling.laws.base import Adjacency, Draws, SamplingLaw, SamplingName
from keras_bandmf.sampling.laws.cyclic_poisson import CyclicPoisson
from keras_bandmf.sampling.laws.fixed_order import FixedOrder
from keras_bandmf.sampling.laws.random_allocation import RandomAllocation

#: Every sampling law, by the name that `sampling=` and the JSON of a plan know it by.
LAWS: dict[SamplingName, SamplingLaw] = {
    law.name: law for law in (CyclicPoisson(), RandomAllocation(), FixedOrder())
}

#: The names alone.
SAMPLINGS: tuple[SamplingName, ...] = tuple(LAWS)

__all__ = ["LAWS", "SAMPLINGS", "Adjacency", "Draws", "SamplingLaw", "SamplingName"]
