"""Which documents a batch was made of."""
