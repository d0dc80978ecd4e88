"""The benchmark: one run, many runs, and the statistics, tables and figures made from them."""
