"""Checkpoints, and the folder that a run writes."""
