"""What every stage runs on: run folders, checkpoints, progress, interruption, processes."""
