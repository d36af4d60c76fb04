"""Forward passes over packed experts, from the reference to the fast ones."""
