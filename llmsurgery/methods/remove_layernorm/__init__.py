"""Methods of `remove-layernorm`, one file each."""
