"""Which layers and operations are known to treat the rows of a batch independently."""
