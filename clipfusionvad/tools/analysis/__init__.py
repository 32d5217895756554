"""What a test or a model has to say beyond its metrics: one file per insight, each numbers and one picture."""
