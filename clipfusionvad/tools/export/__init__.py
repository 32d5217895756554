"""Trained models for other programs: the scoring path as a graph, checked, with a card that says what it is."""
