"""Operations with an implementation of their own for each accelerator."""
