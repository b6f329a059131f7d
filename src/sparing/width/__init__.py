"""Token x head and token x neuron: which heads and neurons exist."""

from sparing.grid.method import discover

discover(__name__, __path__)  # every file of the room registers its methods
