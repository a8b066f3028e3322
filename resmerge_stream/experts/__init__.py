"""The built-in expert group: its data, and what asks it."""
