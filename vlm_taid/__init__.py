"""What people call from Python; see the README."""
