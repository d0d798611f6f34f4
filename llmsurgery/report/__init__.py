"""What people read: the model card section and the terminal tables."""
