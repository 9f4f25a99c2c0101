"""Comparison of the structure module in both frameworks: cases to run, stages of each run, and their judge."""
