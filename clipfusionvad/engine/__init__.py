"""Training, evaluation and checkpoints of whatever method it is given."""
