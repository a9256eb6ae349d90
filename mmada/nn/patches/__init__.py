"""Bytes grouped into patches, and patches read back as bytes (Byte Latent Transformer, arXiv:2412.09871)."""
