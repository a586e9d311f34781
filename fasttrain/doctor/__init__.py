"""Checks what is installed on a machine, and which decoders work on its GPU."""
