"""Errors, files, tensors, versions: nothing that knows the trainer."""
