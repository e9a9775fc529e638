"""The study's cost model and tables recomputed, our own law beside them, and what the tool takes from them as data."""
