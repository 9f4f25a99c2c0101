"""The attention in both frameworks, compared: cases to run, stages of each run, and their judge."""
