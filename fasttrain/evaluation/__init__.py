"""Scores, probabilities, ensembles and submissions."""
