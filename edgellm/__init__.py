"""edgellm: a language model on an NVIDIA Orin, served to the other processes on the board."""

__version__ = "0.1.0"
