"""One declarative spec per architecture family."""
