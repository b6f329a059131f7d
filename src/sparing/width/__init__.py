"""Token x head and token x neuron: which heads and neurons exist."""

from sparing.width import flap, random, uniform

__all__ = ["flap", "random", "uniform"]
