"""Networks by name or description, and which of their parameters are weights."""
