"""Loading models, their final hidden states, and batched generation."""
