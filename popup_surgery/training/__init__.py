"""Learning a mask: the loop, its processes, its checkpoints and the folder of a run."""
