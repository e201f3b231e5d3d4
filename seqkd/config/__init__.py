"""Validated configuration of a run, read from one YAML file. Does not import torch."""
