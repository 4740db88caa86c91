"""What a model's text says: prose, reasoning, calls of tools."""
