"""Results as pages, tables and figures; the file of a test's scores."""
