"""Operations against other libraries, a file an operation."""
