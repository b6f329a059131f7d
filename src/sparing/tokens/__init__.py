"""Token x layer: which (visual) tokens each layer runs on."""

from sparing.grid.method import discover

discover(__name__, __path__)  # every file of the room registers its methods
