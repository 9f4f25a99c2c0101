"""Roof of IPA Twins: both frameworks on the same weights and frames, compared in units of machine epsilon."""
