"""Vector quantisation with its losses and statistics."""
