"""What partial training saves, measured."""
