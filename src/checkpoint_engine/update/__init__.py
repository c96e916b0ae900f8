"""The transaction: its messages, who decides, and both sides of it."""
