"""Sets of preferences on disk: reading them, and making them from a model and a reward."""
