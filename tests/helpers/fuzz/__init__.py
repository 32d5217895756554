"""Damaged, foreign and absurd input for every reader and command: ``make fuzz`` runs it, see ``run.py``."""
