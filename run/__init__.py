"""What surrounds the training loop: flags, checkpoints, resuming, progress, the Hub."""
