"""Pure functions on bytes: digests now; deltas belong here too."""
