"""Evaluation of models on held-out prompts."""
