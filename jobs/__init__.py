"""What a person asks for: one verb, one recipe."""
