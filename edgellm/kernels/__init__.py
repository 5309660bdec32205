"""The CUDA kernels, each `.cu` beside the module that lays out its data and says how to launch it."""
