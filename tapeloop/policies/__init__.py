"""Policies, and resolving them for a model: which variables train, in which group."""
