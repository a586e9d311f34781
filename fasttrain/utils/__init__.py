"""Errors, files, tensors, text and versions; independent of the trainer."""
