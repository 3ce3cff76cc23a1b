"""Reports: rows in, statistics, tables, figures and one page out. Pure functions."""
