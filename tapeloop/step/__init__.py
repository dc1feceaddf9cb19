"""One batch: what runs in which mode, loss and metrics, and a step that happens wholly or not at all."""
