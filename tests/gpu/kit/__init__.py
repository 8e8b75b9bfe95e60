"""What `tests/gpu/verify.py` measures. Needs torch, transformers, safetensors, pyarrow, fsspec and numpy."""
