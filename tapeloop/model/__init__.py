"""A model as a tree, filters on its variables, and the answer of a policy for it."""
