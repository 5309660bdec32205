"""TensorRT without a model in it: which library is at hand, what it can do, and how a plan is built."""
