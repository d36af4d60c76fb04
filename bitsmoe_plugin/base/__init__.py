"""Helpers of all rooms: numbers and files in, the same out; nothing here knows of experts."""
