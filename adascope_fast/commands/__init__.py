"""What each command of `adascope-fast` does, a file a command; each imports torch once its arguments are checked."""
