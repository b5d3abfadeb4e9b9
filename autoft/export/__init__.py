"""Proven artifacts: weights, ONNX, TorchScript and pt2 files, their proof, and their use."""
