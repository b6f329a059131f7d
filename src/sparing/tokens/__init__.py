"""Token x layer: which (visual) tokens each layer runs on."""

from sparing.tokens import fastv, hidrop, oracle, random, uniform

__all__ = ["fastv", "hidrop", "oracle", "random", "uniform"]
