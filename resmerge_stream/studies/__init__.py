"""Several methods in one pass, or none: compare and analyse."""
