"""Ideas that use everything below and that nothing below may import."""
