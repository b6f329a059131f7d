"""Token x layer, whole layers: which layers a token runs."""

from sparing.grid.method import discover

discover(__name__, __path__)  # every file of the room registers its methods
