"""Divergences between two models over the full vocabulary, from hidden states, in chunks."""
