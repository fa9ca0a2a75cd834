"""Channel scores: one pure file each."""
