"""Several processes as one job: signals, ranks, the lock on a folder, random states."""
