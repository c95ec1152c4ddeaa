"""Networks by name and description, and which of their parameters are weights."""
