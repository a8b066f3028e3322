"""The browser face of ResMerge Stream: pages, endpoints and jobs on top of the library."""
