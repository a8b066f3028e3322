"""The one door to the Hub."""
