"""Training runs: loop, processes, checkpoints, exact resume, signals."""
