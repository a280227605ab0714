"""Rows as the model sees them: what is in them, how they add up, and both as text or as a page."""
