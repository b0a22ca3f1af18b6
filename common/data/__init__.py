"""Loaders for data in the formats people have on disk, and the tiny sets written in those formats."""
