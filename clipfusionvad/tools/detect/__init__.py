"""Detection: score videos or a live stream with a trained model, and write tables, figures and pages of the result."""
