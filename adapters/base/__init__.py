"""What every method is built on: targets, layers, hooks, files, and the frozen model."""
