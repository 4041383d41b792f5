"""Hold what devices are: one schema, recorded profiles of real boards as TOML, and their replay."""
