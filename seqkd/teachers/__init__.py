"""The teacher behind an endpoint, and the cache of teacher completions and scores."""
