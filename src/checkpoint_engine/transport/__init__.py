"""Moving bytes and messages between processes: on one host, and between hosts."""
