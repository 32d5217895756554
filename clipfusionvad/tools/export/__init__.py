"""Export of trained models: the scoring path as a graph, checked against the model, with a model card."""

#: The suffixes of exported files; ``forms`` has what each means.
SUFFIXES = (".onnx", ".pt2", ".safetensors", ".pth", ".pt")
