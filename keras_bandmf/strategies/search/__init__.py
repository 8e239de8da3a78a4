"""The search for a strategy: minimizers, a preconditioner, and the files of long searches."""
