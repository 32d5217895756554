"""Many trainings as one: what they differ in, running them, and the table of what came of them."""
