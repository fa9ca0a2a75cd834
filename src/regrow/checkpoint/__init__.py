"""Sharded safetensors in and out, one tensor at a time."""
