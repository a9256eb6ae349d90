"""The model family: its layers, objectives, data and decoding. Knows nothing of Ray, DeepSpeed or MLflow."""
