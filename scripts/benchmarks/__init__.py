"""What scripts/benchmark.py measures, and against what. Seconds are of one machine at one time:
the ratios are what is to be compared."""
