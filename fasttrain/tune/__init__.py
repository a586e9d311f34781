"""Finds settings by training with many of them: what is searched, the trials, and what they found."""
