"""Reports: a page about runs, and the comparison of two of them."""
