"""The page: what stands where, and what each control calls."""
