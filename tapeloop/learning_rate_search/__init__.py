"""The learning-rate range test: steps on trial at rates that rise, of which nothing stays."""
