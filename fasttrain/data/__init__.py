"""Folders of images: index them, check them, draw subsets and a demo set."""
