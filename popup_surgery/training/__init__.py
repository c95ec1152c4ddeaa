"""Learning a mask: the training loop, its processes, its checkpoints and the run's folder."""
