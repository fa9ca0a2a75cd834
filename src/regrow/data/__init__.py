"""From corpora to token batches."""
