"""What goes into a model: its targets, checks of what is given, and trained tokens."""
