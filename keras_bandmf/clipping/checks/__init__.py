"""What is refused, compared or searched before a model trains."""
