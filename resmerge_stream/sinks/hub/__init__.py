"""A repository of the Hub as target."""
