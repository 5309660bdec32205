"""What edgellm takes of the board's memory: planned before it is taken, compared with fact afterwards."""
