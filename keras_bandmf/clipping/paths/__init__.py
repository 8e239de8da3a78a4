"""The ways to clipped sums: book-keeping, one example at a time, chunks; and which one is taken."""
