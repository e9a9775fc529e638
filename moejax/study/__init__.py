"""The study that this project reimplements (arXiv 2408.04693): it imports the tool, and nothing of the tool imports it."""
