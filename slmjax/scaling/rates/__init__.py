"""Learning rate and batch size: published laws, and laws estimated from a sweep."""
