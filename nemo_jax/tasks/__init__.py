"""What becomes a search problem: one file a task."""
