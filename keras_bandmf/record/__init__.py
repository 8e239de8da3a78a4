"""What ran on a set of variables, and the statements composed from it."""
