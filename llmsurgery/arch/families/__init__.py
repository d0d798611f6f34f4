"""One file per architecture, each with a `FAMILY` table."""
