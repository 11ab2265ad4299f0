"""Ways of building preference pairs, one file each. A builder reads and writes files; it never calls a model."""
