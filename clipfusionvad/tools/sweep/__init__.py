"""Many trainings as one: what they differ in, running them, and the tables of their results."""
