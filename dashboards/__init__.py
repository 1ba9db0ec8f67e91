"""A run directory as a page: the front, pictures against the unmodified model's, what each block does, the files."""
