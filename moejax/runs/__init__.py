"""A run's folder and who holds it."""
