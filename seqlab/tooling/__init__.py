"""Tools that describe the library: the catalog, the doctor, and generated documentation pages."""
