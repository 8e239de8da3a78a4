"""The private `fit`: its step, its gate, its callbacks, and the arguments that it accepts."""
