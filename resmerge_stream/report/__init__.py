"""What is told about a merge: its report, its card, its picture."""
