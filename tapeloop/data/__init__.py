"""Anything that holds data -> batches."""
