"""The loop: read, merge, cast, write, publish, verify."""
