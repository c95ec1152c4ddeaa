"""Networks for other runtimes: torch.export's programs and ONNX files, plain or packed, each run before it is written.

Importing the room does not import onnx, onnxscript or onnxruntime, which the extra `[onnx]` installs.
"""
