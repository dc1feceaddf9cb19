"""The version of the package, which the build and checkpoints read too."""

__version__ = "0.1.0"
