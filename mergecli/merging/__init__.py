"""Checkpoints opened together, passed over block by block, and written as one: `merge`, `taskvector`, `cos-sim`, `extract`."""
