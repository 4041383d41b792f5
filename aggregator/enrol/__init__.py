"""A fleet's folder: its CA, who is in it, what its broker is told, and the door for new devices."""
