"""Training on several devices: who computes which part of a batch, and what goes over the wire."""
