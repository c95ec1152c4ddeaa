"""Masks to bytes and back."""
