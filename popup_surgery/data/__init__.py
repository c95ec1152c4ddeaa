"""Turn images into batches: where they come from, in which order, and how they are prepared.

The order and the augmentation depend only on (seed, epoch, image).
"""
