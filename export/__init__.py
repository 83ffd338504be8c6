"""Checkpoint in, proved model repository version out."""
