"""Export of trained models: the scoring path as a graph, checked against the model, with a model card."""

#: The forms of exported files by suffix.
RELEASED = "released form"
FORMS = {".onnx": "ONNX", ".pt2": "torch.export", ".safetensors": "safetensors", ".pth": RELEASED, ".pt": RELEASED}
