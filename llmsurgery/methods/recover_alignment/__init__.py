"""Methods of `llmsurgery recover-alignment`, one file each."""
