"""Vision towers times image tasks, to counts, losses, routes and features: `eval` and its sweeps."""
