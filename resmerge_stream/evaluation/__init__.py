"""EVALUATE: models asked the same questions, and how they differ, in pairs."""
