"""Losses: sums over tokens per row, never means."""
