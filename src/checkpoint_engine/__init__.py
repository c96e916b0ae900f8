"""Transactional, verified weight updates for running LLM inference engines."""
