"""Studies of the objectives on problems with exact solutions and on real models."""
