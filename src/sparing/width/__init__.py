"""Token x head and token x neuron: which heads and neurons exist."""
