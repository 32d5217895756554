"""From video files to feature rows, and what a trained model makes of them."""
