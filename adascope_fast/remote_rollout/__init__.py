"""Rollouts that another process draws, on another GPU or in another engine: the server, and what asks it."""
