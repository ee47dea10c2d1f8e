"""The model room: CLIP, its zero-shot heads, its tasks and their images."""
