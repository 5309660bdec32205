"""What runs the model. See base.py for the contract."""

import os

# ONNX Runtime 1.32's wheel opens a telemetry session when a model is loaded, with a device id and a database
# in the user's cache. Nothing may phone home from a vehicle; this must stand before the import.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
