"""Checks for mistakes that raise no error: in the installation, in data, in runs. A check is one small function."""
