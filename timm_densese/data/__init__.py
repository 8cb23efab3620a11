"""Images on disk: which there are, which belong together, and how they are split."""
