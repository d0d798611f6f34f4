"""The page of results: one module per kind of section, put together by `__main__`."""
