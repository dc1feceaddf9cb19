"""What a model gains from options of the trainer, measured on this device, each candidate in a process of its own."""
