"""Differentially private training of Keras models with correlated noise."""
