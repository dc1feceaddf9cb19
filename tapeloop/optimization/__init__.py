"""A loss -> gradients -> new values."""
