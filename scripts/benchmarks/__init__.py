"""Sections of scripts/benchmark.py. Compare the ratios: absolute times depend on the machine and
its load."""
