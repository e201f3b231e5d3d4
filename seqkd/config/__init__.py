"""One YAML file, read into a validated schema. Imports no torch."""
