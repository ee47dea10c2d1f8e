"""A CLIP in memory: weights in and out, zero-shot heads, preprocessing, cached pixels."""
