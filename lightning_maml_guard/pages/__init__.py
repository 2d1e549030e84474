"""What a guard tells of a whole run: an HTML page, and a summary of a few lines."""
