"""Several methods in one pass, or none: compare, analyse, extract."""
