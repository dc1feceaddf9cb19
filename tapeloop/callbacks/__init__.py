"""Keras' callbacks, in a tapeloop fit."""
