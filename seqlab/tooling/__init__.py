"""What tells about the library: the catalog, the doctor, and the pages that are written from the code."""
