"""Results as pages, tables and figures; the file of a test's scores."""

#: The page of a run, and the formats of a paper's figures.
PAGE, FORMATS = "report.html", ("png", "pdf")
