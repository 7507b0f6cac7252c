"""Trained models, base models and folders of images beside each other: `adascope-fast evaluate`."""
