"""Several processes: what the ranks of a run tell each other."""
