"""Folders of images: indexed, checked, cut, drawn."""
