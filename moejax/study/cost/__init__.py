"""The study's cost model and tables recomputed, our own law next to them, and what the tool takes from them as data."""
