"""Formats on disk: Arrow store, checkpoint directories, run directory, run reader."""
