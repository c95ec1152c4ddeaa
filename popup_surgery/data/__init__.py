"""Images into batches: where they come from, in which order, and how they are prepared."""
