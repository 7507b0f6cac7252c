"""A reward of another process, machine or environment: the server, and what asks it."""
