"""The one place that knows inference engines: how each pauses, takes weights and resumes."""
