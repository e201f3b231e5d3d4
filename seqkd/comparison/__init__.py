"""Methods at equal budget: what is run, what comes of it, and which differences are real."""
