"""`edgellm doctor`: what this board is, whether edgellm can run on it, and what to change."""
