"""Makes each rank of a launcher believe that it is on a host of its own."""

import os

if "RANK" in os.environ:
    os.environ["CKPT_ENGINE_HOST"] = f"host {os.environ['RANK']}"
