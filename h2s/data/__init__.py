"""People's files as checked data sets."""
