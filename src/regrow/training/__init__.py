"""Distillation and LoRA recovery on the ecosystem's trainer."""
