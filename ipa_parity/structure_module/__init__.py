"""The structure module in both frameworks, compared: cases to run, stages of each run, and their judge."""
