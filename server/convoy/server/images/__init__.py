"""Decode image files to tensors, within limits."""
