"""Who follows a run while it goes on: the terminal, trackers, and callbacks of one's own."""
