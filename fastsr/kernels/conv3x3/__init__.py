"""The fused 3x3 convolution."""
