"""The version, alone, so that every file can read it without importing the package."""

__version__ = "1.0.0"
