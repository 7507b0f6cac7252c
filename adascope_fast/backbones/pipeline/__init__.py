"""What a diffusers pipeline brings along: its settings, its files, its state, and what its tokenizers do not read."""
