"""Nearest-code search."""
