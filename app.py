"""Builds the Space's page and launches it; nothing else."""

from space.launch import launch

if __name__ == "__main__":
    launch()
