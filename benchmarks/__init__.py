"""Measurements that anyone can repeat; each prints its numbers, its command and the machine."""
