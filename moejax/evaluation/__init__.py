"""What a model answers, and whether it is right."""
