"""Methods that take away priors and biases, one file each."""
