"""Everything that is read as a checkpoint: LoRA adapters, files with several towers, pickles, names of open_clip."""
