"""Token x expert: which experts of a mixture run, or stay at all."""

from sparing.grid.method import discover

discover(__name__, __path__)  # every file of the room registers its methods
