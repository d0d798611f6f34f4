"""Devices, loading, the chunked head: what scoring and training share."""
