"""First floor: makes a selection real on a live model."""
