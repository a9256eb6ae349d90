"""What `mmada train` can learn: data, model, loss and measurement together. ``registry`` names them."""
