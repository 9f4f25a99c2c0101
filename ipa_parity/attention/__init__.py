"""Comparison of the attention in both frameworks: cases to run, stages of each run, and their judge."""
