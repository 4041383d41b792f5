"""Say how devices fare over time: the format of traces, what is converted to it, made-up ones."""
