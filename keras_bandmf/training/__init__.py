"""The private `fit`: its step, its gate, its callbacks and the arguments it takes."""
