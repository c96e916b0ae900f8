"""How fast is this machine at updates, next to what it could be at best? `ckpt-engine bench`."""
