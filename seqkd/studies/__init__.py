"""Studies on problems small enough to be exact, and of the estimators on real models."""
