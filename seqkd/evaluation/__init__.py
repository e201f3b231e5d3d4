"""Measurements of a student on prompts that it was not trained on."""
