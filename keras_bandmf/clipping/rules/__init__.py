"""Clipping rules: the gradient of every example by the weights of one type of layer."""
