"""Methods of the task `redirect`, one file each."""
