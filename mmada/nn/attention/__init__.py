"""What attention is computed with: which keys a query sees, and the kernels that go over them."""
