"""The main job in one command: train a small model and keep serving replicas up to date with it."""
