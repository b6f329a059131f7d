"""Third floor: measures methods on real models: tasks, timing, bounds, comparisons and their report."""
