"""Methods: one file each, in the folder of its task."""
