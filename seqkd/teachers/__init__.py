"""Teachers behind an endpoint, and the cache of what teachers wrote and scored."""
