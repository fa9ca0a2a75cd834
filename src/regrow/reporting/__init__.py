"""From results to plots, one HTML page and the model card."""
