"""Decoding with few operations per layer, for language models of the usual shape."""
