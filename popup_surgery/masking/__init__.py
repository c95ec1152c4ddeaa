"""What `convert` does to a network, and how `bake` turns it back into plain layers.

Decides which weights are masked, how a masked layer works, and what happens to all other parameters.
"""
