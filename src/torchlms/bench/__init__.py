"""The benchmark command and its networks."""
