"""From video files to feature files: decode frames, cut crops, encode them with CLIP, write one row per snippet."""
