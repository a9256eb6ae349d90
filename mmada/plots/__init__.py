"""Looking instead of reading: figures of training and of the model."""
