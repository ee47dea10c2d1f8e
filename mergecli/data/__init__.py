"""Image tasks: class names and prompts, images on disk, decoding, corruptions, the toy world."""
