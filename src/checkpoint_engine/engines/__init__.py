"""How inference engines are asked over HTTP to take an update: one file for each kind."""
