"""The method on arrays: the α search, the fused row, the choice of a token. Knows no model."""
