"""Pure planning: where tensors lie, what travels in which bucket. No I/O in this room."""
