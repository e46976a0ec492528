"""Data sets: where the images come from (one source a file), what is done to them, and how batches are made."""
