"""An inference server on transformers whose weights are swapped in place between two tokens."""
