"""Prints the name of the first GPU that this process sees."""

from checkpoint_engine.device_utils import device_uuid

print(device_uuid())
