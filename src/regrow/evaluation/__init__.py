"""What the pruned model can still do, measured beside its parent."""
