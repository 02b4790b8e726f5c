"""What the tests share: small models of every family, and the rows of the matrix."""
