"""What is frozen and comes first in the model is computed once for each example."""
