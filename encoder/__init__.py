"""The FluxViT encoder: files to frames to as many tokens as the budget allows."""
