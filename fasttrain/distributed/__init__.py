"""Ranks, signals, and a watch over ranks that hang."""
