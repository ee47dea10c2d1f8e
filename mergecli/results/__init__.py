"""What evaluations found: the result file, tables, intervals, published tables, plots, the web page."""
