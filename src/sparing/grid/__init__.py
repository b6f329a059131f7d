"""Ground floor: pure tensors. Knows nothing of transformers."""
