"""Comparison of methods at equal budget: the plan, the results and the statistics."""
