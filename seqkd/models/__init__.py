"""Loading, pruning, adaptation and export of models, and their output heads."""
