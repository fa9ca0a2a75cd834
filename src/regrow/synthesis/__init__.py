"""The teacher-written corpus."""
