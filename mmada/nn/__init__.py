"""Every layer of the model."""
