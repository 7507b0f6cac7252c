"""The names of other trainers, on this engine: change an import, keep the script."""
