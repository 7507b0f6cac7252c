"""The interfaces of other trainers over this engine: change an import, keep the script."""
