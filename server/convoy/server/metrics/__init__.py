"""Prometheus metrics and the statistics of models."""
