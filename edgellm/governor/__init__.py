"""Backs off before the board does: sensors read, policy decides, the daemon applies batch cap and duty."""
