"""The poster's experiments: a phase diagram for each of its panels."""
