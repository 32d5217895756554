"""What silently ruins a result, each looked for by one small function: installation, data, runs."""
