"""CUDA without a model in it: the driver, NVRTC, cubins, and what a launch is."""
