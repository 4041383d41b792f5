"""Make traces of what others have recorded, one module a format."""
