"""Token x expert: which experts of a mixture run, or stay at all."""

from sparing.experts import easy_ep, frequency, gate, random

__all__ = ["easy_ep", "frequency", "gate", "random"]
