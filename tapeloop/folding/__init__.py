"""The frozen part of a step computes with folded values: what depends on frozen weights alone is computed once."""
