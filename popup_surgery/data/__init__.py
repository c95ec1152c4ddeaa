"""Images into batches: where they come from, in which order, and how they are prepared.

The order and the augmentation are functions of (seed, epoch, image) alone.
"""
