"""Tests of `tapeloop/folding`."""
