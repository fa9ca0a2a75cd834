"""Safetensors checkpoints, read and written tensor by tensor without torch."""

from regrow.checkpoint.reader import CheckpointReader, read_config_only

__all__ = ["CheckpointReader", "read_config_only"]
