"""Load, prune, adapt and export models; their output heads."""
