"""The environments: one prompt at a time, and a native batch."""
