"""Models whose loader may be held: `SGLANG_EXTERNAL_MODEL_PACKAGE=held_sglang`."""
