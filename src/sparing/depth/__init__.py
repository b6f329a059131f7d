"""Token x layer, whole layers: which layers a token runs."""

from sparing.depth import random, unified_layer_skipping, uniform

__all__ = ["random", "unified_layer_skipping", "uniform"]
