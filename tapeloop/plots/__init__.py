"""Pictures by matplotlib: a history, and a model with what trains of it. matplotlib is imported when one is drawn."""
