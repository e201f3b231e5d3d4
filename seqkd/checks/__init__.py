"""Checks before the first step and in every step."""
