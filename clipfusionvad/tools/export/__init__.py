"""Export of trained models: the scoring path as a graph, checked against the model, with a model card."""
