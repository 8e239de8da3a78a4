"""The command line of keras_bandmf. It stands apart, because that package imports TensorFlow."""
