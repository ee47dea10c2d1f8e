"""Files: safetensors read and written block by block, whole or not at all; sources, the store, the cache."""
