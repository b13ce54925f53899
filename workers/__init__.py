"""A rank: model, layers, KV cache, groups and the process around them. Never imports ``drumline.engine``."""
