"""regrow prunes the MLPs of a language model and regrows its ability."""

__version__ = "0.1.0"
