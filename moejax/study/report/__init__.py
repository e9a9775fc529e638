"""Figures and tables from what runs have written. Imports neither training nor profiling."""
