"""Checks before the first step and during every step."""
